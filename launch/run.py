"""`python -m launch run [OPTIONS] -- …`: `accelerate launch` with the words after the dashes.

Around it stands a parent that adds what accelerate leaves out:

- SIGTERM, SIGINT, SIGUSR1 and SIGHUP reach the ranks; accelerate dies of SIGUSR1, and with one rank of any of them, and
  leaves the ranks behind;
- after a crash all ranks are started again, up to N times;
- the exit code is the recipe's own, of which accelerate makes 1: 0; 2 after a mistake of the user; 75 where the run was
  stopped and can go on (by a signal, or because it hung); 1 after anything else; 128 + n after a second signal n;
- with `--resumable FILE`, 75 is told by that file, and the exit code is 0: for `srun --kill-on-bad-exit`, which would
  end the other nodes before they have ended by themselves;
- with `--label`, each line that a rank prints begins with its number;
- on one node, the ranks meet through files and loopback, so that no port must be free, or open to others;
- no process is left, and none outlives this one for longer than a step and a save.

The ranks' side of it is `toolkit.signals` and `toolkit.environment.report_exit_code`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from launch.processes import Parent

CRASHED, USER_ERROR, RESUMABLE = 1, 2, 75  # the last is EX_TEMPFAIL of sysexits.h

_QUIETLY = """
import subprocess, sys
from accelerate.commands.accelerate_cli import main
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    main()
except (SignalException, KeyboardInterrupt, subprocess.CalledProcessError):
    sys.exit(1)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    sys.exit(f"launch: rank {rank} ended first, with exit code {failure.exitcode}")
"""
"""Signals that it has handed on, and ranks that have said why they end: of them, accelerate alone makes tracebacks."""
ACCELERATE = (sys.executable, "-c", _QUIETLY, "launch")

THROUGH_FILES = ("--main_process_port", "0", "--rdzv_backend", "c10d", "--rdzv_conf", "store_type=file")
"""A rendezvous that opens no socket. It is no use in accelerate's file, which does not pass the back-end on."""

ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def main(argv: Sequence[str]) -> int:
    """Run `accelerate launch` with these words, again after a crash if asked; the exit code of the last run."""
    parser = ArgumentParser(
        prog="python -m launch run",
        usage="%(prog)s [--restarts N] [--grace SECONDS] [--label] [--resumable FILE] -- …",
        allow_abbrev=False,
    )
    parser.description = "Run `accelerate launch` with the words after the dashes."
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="at most, after crashes (default: 0)")
    parser.add_argument(
        "--grace", type=float, default=60, metavar="SECONDS", help="to save in, after a signal (default: 60)"
    )
    parser.add_argument("--label", action="store_true", help="begin each line with the rank that printed it")
    parser.add_argument(
        "--resumable", metavar="FILE", help="make this file, and end with 0, where the run can go on (instead of 75)"
    )
    dashes = argv.index("--") if "--" in argv else len(argv)
    options, others = parser.parse_known_args(argv[:dashes])
    words = list(argv[dashes + 1 :])
    if others or not words:
        fact = f"{others[0]} is no option of this command" if others else "there is nothing to launch"
        parser.error(f"{fact}: what is for `accelerate launch` comes after --")
    if options.restarts < 0 or options.grace <= 0:
        parser.error("--restarts is at least 0, and --grace more than 0")
    if "max_restarts" in _launcher_options(words):
        parser.error("--max_restarts restarts ranks that cannot meet again: use --restarts before the dashes")
    code = _run(words, options)
    if code == RESUMABLE and options.resumable:
        Path(options.resumable).touch()
        return 0
    return code


def verdict(codes: set[int], ended_well: bool, asked: bool) -> int:
    """The exit code of a job.

    Args:
        codes: those that ranks have left. A rank that was killed leaves none.
        ended_well: whether `accelerate launch` ended with 0, as it does where all ranks do.
        asked: whether a signal came.
    """
    if ended_well:
        return 0
    if codes - {0, USER_ERROR, RESUMABLE}:
        return CRASHED
    for code in (USER_ERROR, RESUMABLE):  # ranks that wait for one that has left do not end by themselves
        if code in codes:
            return code
    if asked:
        return 0 if codes else RESUMABLE
    return CRASHED


def several_nodes(words: Sequence[str]) -> bool:
    """Whether `accelerate launch` with these words is one of several: by option, or by its configuration file."""
    options = _launcher_options(words)
    number = options.get("num_machines")
    if number is None:
        cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
        file = Path(options.get("config_file", Path(cache) / "accelerate" / "default_config.yaml")).expanduser()
        said = re.search(r"^[^#\n]*\bnum_machines\W+(\d+)", file.read_text("utf-8") if file.is_file() else "", re.M)
        number = said[1] if said else "1"
    return number.isdecimal() and int(number) > 1


def _run(words: Sequence[str], options: Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="launch-") as folder, Parent(options.grace) as parent:
        for attempt in itertools.count(1):
            place = Path(folder) / str(attempt)
            place.mkdir()
            ended_well = parent.run(_command(words, place, options), _environment(words, place, options))
            if parent.insisted:
                return 128 + parent.insisted
            code = verdict(_codes(place), ended_well, bool(parent.asked))
            if code in (0, USER_ERROR) or parent.asked or attempt > options.restarts:
                return code
            what = "stopped itself" if code == RESUMABLE else "crashed"
            print(f"launch: the job {what}; restart {attempt} of {options.restarts}", file=sys.stderr, flush=True)
    raise AssertionError


def _command(words: Sequence[str], place: Path, options: Namespace) -> list[str]:
    meeting = () if several_nodes(words) else THROUGH_FILES
    # Through the launcher, which begins each line with the rank; it keeps what it has passed on in that folder.
    labels = ("--tee", "3", "--log_dir", str(place / "logs")) if options.label else ()
    return [*ACCELERATE, *meeting, *labels, *words]


def _environment(words: Sequence[str], place: Path, options: Namespace) -> dict[str, str]:
    """That of the ranks and their launcher; `place` is an empty folder."""
    (place / "codes").mkdir()
    said = {
        "TOOLKIT_EXIT_CODES": str(place / "codes"),
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(options.grace)),
    }
    if options.label:
        said["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
    if several_nodes(words):
        return os.environ | said
    said |= {
        "PET_RDZV_ENDPOINT": str(place / "rendezvous"),
        "PET_LOCAL_ADDR": "127.0.0.1",
        # Otherwise the launcher opens a store to everybody, and ranks that it restarts find old addresses there.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TOOLKIT_STORE": str(place / "store"),
    }
    return ON_LOOPBACK | os.environ | said


def _codes(place: Path) -> set[int]:
    return {int(text) for file in (place / "codes").iterdir() if (text := file.read_text("ascii")).isdecimal()}


def _launcher_options(words: Sequence[str]) -> dict[str, str]:
    """What `accelerate launch` takes for itself, by name; what follows the script is the script's."""
    own = list(itertools.takewhile(lambda word: not word.endswith(".py"), words))
    options = {}
    for word, following in itertools.zip_longest(own, own[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else following
    return options
