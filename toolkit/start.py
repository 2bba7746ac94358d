"""Start a recipe from the command line: parse, run, and turn a user's mistake into one screen and exit code 2."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO, TypeVar, cast

import transformers

from toolkit import GARBAGE_THRESHOLD
from toolkit.config import parse
from toolkit.environment import Ranks, is_main_rank, rank_name, report_exit_code
from toolkit.errors import RESUMABLE_EXIT_CODE, USER_ERROR_EXIT_CODE, LaunchError, ToolkitError
from toolkit.report import Console
from toolkit.requirements import check_versions
from toolkit.runs import Finished
from toolkit.session import Interrupted, Previewed
from toolkit.signals import ignore_all

INTERRUPTED_EXIT_CODE = 130
CLOSED_PIPE_EXIT_CODE = 141

Settings = TypeVar("Settings")


def start(
    main: Callable[[Settings], object], config_class: type[Settings], description: str, *, alone: bool = False
) -> None:
    """Run `main` with the settings that the command line gives.

    Args:
        main: the recipe.
        config_class: its settings.
        description: of it, for `--help`.
        alone: it trains nothing, and has no use for more than one process.

    Raises:
        SystemExit: with code 2 after a user's mistake (with `--run.debug True` the error itself is raised), 75 after
            a signal that left a run to go on with, 130 after Ctrl-C before there was one, 141 where the output's
            reader has left.
    """
    code = 1
    try:
        _run(main, config_class, description, alone)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        report_exit_code(code)


def _run(main: Callable[[Settings], object], config_class: type[Settings], description: str, alone: bool) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # by DCP, of a process alone
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # what the imports have made is never garbage
    gc.set_threshold(*GARBAGE_THRESHOLD)
    debug = False
    try:
        check_versions()
        config = parse(config_class, description=description, quiet=not is_main_rank())
        debug = getattr(getattr(config, "run", None), "debug", False)
        if alone and Ranks.read().size > 1:
            raise LaunchError(
                f"{Ranks.read().size} processes were started for what one of them does", "Start it with python alone."
            )
        with redirect_stdout(_lasting(sys.stdout)), redirect_stderr(_lasting(sys.stderr)):
            main(config)
    except Finished as finished:
        Console(quiet=not is_main_rank()).note(
            f"{finished.path} is finished: there is nothing to do. Its report: {finished.path / 'report.html'}\n"
            "A new run: --checkpoint.resume never, or another --run.dir. To train on: --train.steps N "
            "--checkpoint.allow_change train.steps."
        )
    except Previewed:
        pass
    except Interrupted:
        ignore_all()  # a launcher that misses one rank sends the others a signal
        raise SystemExit(RESUMABLE_EXIT_CODE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    except BrokenPipeError:
        # The reader of `--help | head` has left; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE_EXIT_CODE) from None
    except ToolkitError as error:
        if debug:
            raise
        show(error)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None


class _Lasting:
    """An output that falls silent when its reader has left.

    Ctrl-C ends a `tee` before the run that writes to it has saved, and a terminal may be closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _lasting(stream: TextIO) -> TextIO:
    return cast(TextIO, _Lasting(stream))


def show(error: ToolkitError) -> None:
    """The error in one screen on rank 0, in one line on the others, which may have met another one."""
    if is_main_rank():
        Console().error(error)
    else:
        print(f"[rank {rank_name()}] {type(error).__name__}: {error.message}", file=sys.stderr)
