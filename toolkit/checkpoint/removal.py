"""The command `toolkit checkpoint rm`: what it asks, what it refuses, and the pointer that has to follow."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from toolkit.checkpoint.listing import Item, examine, in_quarantine, open_store, path_of, size_of
from toolkit.checkpoint.screen import human_size, plain, reading
from toolkit.checkpoint.store import POINTER, Store
from toolkit.errors import CheckpointError, ConfigError
from toolkit.folders import run_lock, sync_folder


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--step", type=int, action="append", default=[], metavar="N", help="a checkpoint to remove; may be repeated"
    )
    parser.add_argument("--quarantine", action="store_true", help="remove all that is in quarantine")
    parser.add_argument(
        "--yes", action="store_true", help="do not ask, and remove even the last one that a run can go on from"
    )


def run(options: Namespace) -> int:
    """`toolkit checkpoint rm`.

    Returns:
        0; 1 if the answer was no.

    Raises:
        ToolkitError: a mistake of the user, or a run that goes on.
    """
    if not options.step and not options.quarantine:
        raise ConfigError("there is nothing to remove", "Name --step N, once for each; or --quarantine.")
    store = open_store(options.run)
    with _held(store.folder.parent):
        doomed = [path_of(store, step) for step in sorted(set(options.step))]
        shelf = in_quarantine(store) if options.quarantine else []
        if not doomed and not shelf:
            print("nothing is in quarantine")
            return 0
        if not options.yes:
            _keep_a_good_one(store, doomed)
            if not _confirmed([*doomed, *(item.path for item in shelf)]):
                print("nothing was removed")
                return 1
        _remove(store, doomed, shelf)
    return 0


def _remove(store: Store, doomed: Sequence[Path], shelf: Sequence[Item]) -> None:
    for path in doomed:
        size = size_of(path)
        store.remove(path)
        print(plain(f"removed {path} ({human_size(size)})"))
    if doomed:
        _point_to_the_newest(store)
    for item in shelf:
        shutil.rmtree(item.path, ignore_errors=True)
        if item.path.exists():
            raise CheckpointError(f"{item.path} cannot be removed", "Check the permissions of its folder.")
        Path(f"{item.path}.txt").unlink(missing_ok=True)
        print(plain(f"removed {item.path} ({human_size(item.size)})"))


def _keep_a_good_one(store: Store, doomed: Sequence[Path]) -> None:
    """Refuse to leave a run with nothing that it could go on from."""
    left = [path for _, path in store.committed() if path not in doomed]
    if not doomed:
        return
    with reading(left[:1]) as advance:
        if any(examine(path, deep=True, advance=advance).state == "good" for path in left):
            return
    raise CheckpointError(
        f"{store.folder} would have no good checkpoint any more, and the run could not go on",
        "Keep one; or remove the last one all the same with --yes.",
    )


def _confirmed(paths: Sequence[Path]) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked whether to remove, as there is no terminal", "Add --yes.")
    for path in paths:
        print(plain(f"{path} ({human_size(size_of(path))})"))
    try:
        return input("remove for good? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _point_to_the_newest(store: Store) -> None:
    """A pointer to what the user has removed would be taken for a loss at the next start."""
    newest = next(iter(store.committed()), None)
    if newest is None:
        (store.folder / POINTER).unlink(missing_ok=True)
        sync_folder(store.folder)
    else:
        store.point_to(*newest)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the run's folder, as its own processes do.

    Raises:
        CheckpointError: one of them does, or the folder cannot be written to.
    """
    lock = run_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(f"a process is writing to {folder}", "Stop the run, or let it end.") from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to: {error.strerror}", "Check its permissions.") from error
    try:
        yield
    finally:
        lock.release()
