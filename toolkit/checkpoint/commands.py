"""The commands `toolkit checkpoint …`: their options, what they refuse, and what they show.

torch is imported by those that read tensors, when they do.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.arguments import number, whole
from toolkit.checkpoint import removal
from toolkit.checkpoint.listing import (
    Item,
    best_of,
    committed,
    examine,
    find,
    in_quarantine,
    is_checkpoint,
    open_store,
    unfinished,
)
from toolkit.checkpoint.screen import count, facts, human_size, plain, reading, show_table
from toolkit.checkpoint.store import Store
from toolkit.errors import CheckpointError, ConfigError
from toolkit.folders import refuse_taken
from toolkit.requirements import check_versions

_SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]B")  # as in checkpoint.max_shard_size
_RUN = "folder of a run, or of one of its checkpoints"


def _ls_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--deep", action="store_true", help="read every file; otherwise names and sizes are compared")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _ls(options: Namespace) -> int:
    store = open_store(options.run)
    with reading([path for _, path in store.committed()] if options.deep else ()) as advance:
        items = committed(store, deep=options.deep, advance=advance)
    newest, best = store.pointer(), best_of(items)
    rows = [facts(item) | {"newest": item.step == newest, "best": item is best} for item in items]
    writing, shelf = unfinished(store), in_quarantine(store)
    if options.json:
        others = {"unfinished": [*map(facts, writing)], "quarantine": [*map(facts, shelf)]}
        print(json.dumps({"run": str(options.run), "checkpoints": rows} | others, ensure_ascii=False, indent=1))
        return 0
    if rows:
        show_table(rows)
    else:
        print("no checkpoint")
    if newest is not None and items and newest != items[0].step:
        print(f"\nthe one that was committed last, of step {newest}, is not the newest here")
    _show_reasons(items + writing + shelf)
    return 0


def _verify_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help=_RUN)
    parser.add_argument("--step", type=whole(), metavar="N", help="this one alone (default: all)")
    parser.add_argument(
        "--digest",
        action="store_true",
        help="tell one SHA-256 of the whole state, equal for equal states whatever strategy and ranks wrote them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(options: Namespace) -> int:
    paths = find(options.run, options.step, command="verify")
    with reading(paths) as advance:
        items = [examine(path, deep=True, advance=advance) for path in paths]
    digests = {}
    if options.digest:
        check_versions()
        for index, item in enumerate(items):
            if item.state == "good":
                items[index], digests[item.path] = _with_digest(item)
    good = all(item.state == "good" for item in items)
    if options.json:
        rows = [facts(item) | ({"digest": digests.get(item.path)} if options.digest else {}) for item in items]
        print(json.dumps({"good": good, "checkpoints": rows}, ensure_ascii=False, indent=1))
    else:
        for item in items:
            more = item.reason or digests.get(item.path, "")
            print(plain(f"step {item.step:>8}  {item.state:<7}  {human_size(item.size):>9}  {more}").rstrip())
    return 0 if good else 1


def _with_digest(item: Item) -> tuple[Item, str]:
    from toolkit.checkpoint.joined import state_digest

    assert item.manifest is not None
    try:
        return item, state_digest(item.path, item.manifest)
    except CheckpointError as error:  # what was made by hand can have the right hashes
        return replace(item, state="corrupt", reason=error.message), ""


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help=_RUN)
    parser.add_argument("target", metavar="TARGET", type=Path, help="new folder: weights, config.json, tokenizer")
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help="this one; or best: of the lowest validation loss; or latest (the default)",
    )
    parser.add_argument(
        "--max-shard-size", type=_shard_size, metavar="SIZE", help="largest file (default: 5GB); not for an adapter"
    )
    parser.add_argument(
        "--bound",
        type=number(),
        default=1e-5,
        metavar="X",
        help="refuse the export if weights or logits differ by more, once it is loaded again (default: 1e-5)",
    )


def _export(options: Namespace) -> int:
    target = options.target.expanduser()
    refuse_taken(target)
    path = _chosen(options.run.expanduser(), options.step or "latest")
    _outside(target, path)
    base = path.resolve().parent.parent / "base"
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base} is missing, and with it the model's configuration and its tokenizer",
            "A run writes it when it starts. Keep the checkpoint in the folder of its run.",
        )
    check_versions()
    manifest = _verified(path)
    from toolkit.checkpoint.adapted import export_adapter
    from toolkit.checkpoint.export import export_model, load_weights

    if manifest.get("base"):
        if options.max_shard_size:
            raise ConfigError("--max-shard-size has no effect on an adapter, which is one file", "Drop it.")
        proof = export_adapter(base, load_weights(path, manifest), target, options.bound)
    else:
        proof = export_model(base, load_weights(path, manifest), target, options.max_shard_size or "5GB", options.bound)
    print(target)
    print(
        f"step {manifest['step']}: {proof.parameters:,} parameters in {proof.tensors} tensors and "
        f"{count(proof.files, 'file')} ({human_size(proof.bytes)}); loaded again, its weights differ by at most "
        f"{proof.weight_difference:.3g} and its logits by {proof.logit_difference:.3g} (bound {proof.bound:g})",
        file=sys.stderr,
    )
    return 0


def _convert_arguments(parser: ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}: one file for each kind (weights.safetensors, exp_avg.safetensors, …), and state.json "
        "with step, metrics and world. With --foreign, all tensors go to tensors.safetensors"
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=_RUN)
    parser.add_argument("target", metavar="TARGET", type=Path, help="new folder")
    parser.add_argument("--step", type=whole(), metavar="N", help="this one (default: the newest)")
    parser.add_argument(
        "--foreign",
        action="store_true",
        help="SOURCE is a folder of torch's distributed checkpoints or of safetensors that another tool wrote; "
        "nothing that lies in it is run",
    )


def _convert(options: Namespace) -> int:
    source, target = options.source.expanduser(), options.target.expanduser()
    refuse_taken(target)
    if options.foreign:
        return _convert_foreign(source, target, options.step)
    if source.is_dir() and not is_checkpoint(source) and not Store(source).folder.is_dir():
        raise CheckpointError(
            f"{source} is no run and no checkpoint of one: it has no manifest that says what is to be in it",
            "If another tool wrote it: --foreign.",
        )
    path = find(source, options.step, command="convert")[0]
    _outside(target, path)
    check_versions()
    manifest = _verified(path)
    from toolkit.checkpoint.convert import convert

    _show_converted(target, convert(path, manifest, target).files)
    return 0


def _convert_foreign(source: Path, target: Path, step: int | None) -> int:
    if step is not None:
        raise ConfigError(f"--step {step} has no effect on a folder of another tool", "Drop it.")
    if not source.is_dir():
        raise CheckpointError(f"there is no folder {source}", f"Relative names are looked for in {Path.cwd()}.")
    if is_checkpoint(source) or Store(source).folder.is_dir():
        raise ConfigError(f"--foreign: {source} is one of ours", "Drop --foreign: it is verified then.")
    check_versions()
    from toolkit.checkpoint.convert import convert_foreign

    converted = convert_foreign(source, target)
    for name in converted.left_out:
        print(plain(f"warning: {name} is no tensor but a pickle: it was neither loaded nor written"), file=sys.stderr)
    _show_converted(target, converted.files)
    return 0


def _show_converted(target: Path, files: Mapping[str, int]) -> None:
    print(target)
    for name, tensors in files.items():
        print(f"{name}: {tensors:,} tensors, {human_size((target / name).stat().st_size)}", file=sys.stderr)


def _chosen(run: Path, step: int | str) -> Path:
    if isinstance(step, int):
        return find(run, step, command="export")[0]
    newest = find(run, None, command="export")[0]
    if step == "latest":
        return newest
    best = None if is_checkpoint(run) else best_of(committed(Store(run)))
    if best is None:
        raise CheckpointError(
            f"no good checkpoint in {run} has a validation loss", "Name a step, or use --step latest."
        )
    return best.path


def _verified(path: Path) -> dict[str, object]:
    """The manifest of a checkpoint in which every file is what was written.

    Raises:
        CheckpointError: one is not.
    """
    with reading([path]) as advance:
        item = examine(path, deep=True, advance=advance)
    if item.manifest is None or item.state != "good":
        others = [
            str(step) for step, other in Store(path.resolve().parent.parent).committed() if other.name != path.name
        ]
        raise CheckpointError(
            f"{path} is damaged: {item.reason}",
            f"Take another with --step: {', '.join(others)}." if others else "Take it from a backup.",
        )
    return dict(item.manifest)


def _outside(target: Path, checkpoint: Path) -> None:
    """Refuse to write into a checkpoint, which would not be good any more, or among those of a run."""
    folder = checkpoint.resolve()
    if {folder, Store(folder.parent.parent).folder} & set(target.resolve().parents):
        raise ConfigError(f"{target} is inside of a folder of checkpoints", "Name a folder elsewhere.")


def _show_reasons(items: Iterable[Item]) -> None:
    lines = [
        f"{item.path.parent.name}/{item.path.name} ({item.state}, {human_size(item.size)}): {item.reason}"
        for item in items
        if item.state != "good"
    ]
    if lines:
        print("\n" + "\n".join(map(plain, lines)))


def _step(word: str) -> int | str:
    if word not in ("best", "latest") and not word.isdecimal():
        raise ArgumentTypeError(f"{word!r} is neither a whole number nor best nor latest")
    return word if not word.isdecimal() else int(word)


def _shard_size(word: str) -> str:
    if not _SHARD_SIZE.fullmatch(word):
        raise ArgumentTypeError(f"{word!r} is no size like 500MB or 5GB")
    return word


def _samples() -> Any:
    return importlib.import_module("toolkit.checkpoint.samples_command")  # with numpy


Command = tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace], int]]

COMMANDS: dict[str, Command] = {
    "ls": ("list the checkpoints of a run, and their state", _ls_arguments, _ls),
    "verify": ("read every file and compare it with what was written", _verify_arguments, _verify),
    "export": ("write a model folder as transformers loads it, and prove it", _export_arguments, _export),
    "convert": ("write the training state as plain safetensors for other tools", _convert_arguments, _convert),
    "rm": ("remove checkpoints, or what is in quarantine", removal.add_arguments, removal.run),
    "samples": (
        "add up what every attempt consumed: none lost, none twice",
        lambda parser: _samples().add_arguments(parser),
        lambda options: int(_samples().run(options)),
    ),
}
"""What each command does in one line, what adds its options to a parser, and what runs it."""
