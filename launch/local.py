"""`python -m launch local RECIPE [--processes P] [--cpu] [--strategy S] [--restarts N] -- OPTIONS`: on this machine.

It says which `accelerate launch` that amounts to, and runs it as `python -m launch run` does: signals reach the ranks,
a crash is followed by another attempt, nothing is left behind. With `--nodes`, `--rank` and `--address` this machine
is one of several, on each of which the command is given; `python -m launch ssh` does that.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from launch import run
from launch.accelerate_config import STRATEGIES, Start, render
from launch.errors import UserError
from launch.processes import Parent

DOCTORS_GRACE = 1.0
PORT = 29500
"""Of the rendezvous of several nodes, where nothing else is said: that of accelerate."""


def main(argv: Sequence[str]) -> int:
    """Start a recipe on this machine; the exit code is that of `launch run`.

    Raises:
        UserError: what cannot start.
    """
    parser = ArgumentParser(
        prog="python -m launch local",
        usage="%(prog)s RECIPE [--processes P] [--cpu] [--strategy S] [--restarts N] [--dry-run] -- OPTIONS",
        allow_abbrev=False,
    )
    parser.description = "Start a recipe on this machine, with the options of the recipe after the dashes."
    add_arguments(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="of this node among several (default: 0)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="on which this is given (default: 1)")
    parser.add_argument("--address", default="", help="of the first node, as the others see it; for several nodes")
    parser.add_argument("--port", type=int, default=PORT, help="on the first node (default: %(default)s)")
    parser.add_argument(
        "--doctor", action="store_true", help="let `toolkit doctor` look first, and start if all is well"
    )
    parser.add_argument(
        "--obey", action="store_true", help="take the names of signals from standard input; its end is SIGTERM"
    )
    parser.add_argument(
        "--resumable-code",
        type=int,
        default=run.RESUMABLE,
        metavar="CODE",
        help="in place of %(default)s, if it can go on",
    )
    own, options = divide(argv)
    asked = parser.parse_args(own)
    try:
        start = start_of(asked)
    except ValueError as error:
        raise UserError(str(error)) from error
    if asked.obey:
        threading.Thread(target=_obey, daemon=True).start()
    else:
        show(start, asked, options)
    if asked.dry_run:
        return 0
    if asked.doctor and (code := _examine(start, asked, options)):
        return asked.resumable_code if code == run.RESUMABLE else code
    if start.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate's file alone does not keep ranks off the GPUs
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        file = Path(folder) / "accelerate.yaml"
        file.write_text(render(start), encoding="utf-8")
        words = ["--config_file", str(file), *node_options(start, asked.rank), asked.recipe, *options]
        code = run.main(["--restarts", str(asked.restarts), "--grace", str(asked.grace), "--", *words])
    return asked.resumable_code if code == run.RESUMABLE else code


def add_arguments(parser: ArgumentParser) -> None:
    """What is said of a start, on one machine or on each of several."""
    parser.add_argument("recipe", metavar="RECIPE", help="file of the recipe, as recipes/sft.py")
    parser.add_argument("--processes", type=int, metavar="P", help="on a machine (default: one for each GPU, else one)")
    parser.add_argument("--cpu", action="store_true", help="CPU ranks, even where there are GPUs")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="what to ask the recipe for")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="at most, after crashes (default: 0)")
    parser.add_argument("--grace", type=float, default=60, metavar="SECONDS", help="to save in, after a signal (60)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be started, and start nothing")


def divide(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line at its dashes: the words before them, and those after them."""
    dashes = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:dashes]), list(argv[dashes + 1 :])


def start_of(asked: Namespace) -> Start:
    """The processes that are asked for.

    Raises:
        ValueError: what cannot start.
    """
    if not Path(asked.recipe).is_file():
        raise ValueError(f"there is no recipe {asked.recipe}")
    if asked.nodes > 1 and not 0 <= asked.rank < asked.nodes:
        raise ValueError(f"--rank {asked.rank} is not one of {asked.nodes} nodes, which count from 0")
    if asked.restarts < 0 or asked.grace <= 0:
        raise ValueError("--restarts is at least 0, and --grace more than 0")
    gpus = 0 if asked.cpu else gpus_here()
    processes = (gpus or 1) if asked.processes is None else asked.processes
    if gpus and processes > gpus:
        raise ValueError(f"{processes} processes, but this machine has {gpus} GPUs: start fewer, or add --cpu")
    start = Start(
        processes=processes * asked.nodes,
        strategy=asked.strategy,
        cpu=not gpus,
        nodes=asked.nodes,
        address=asked.address,
        port=asked.port,
    )
    render(start)  # refuses what cannot start
    return start


def gpus_here() -> int:
    """GPUs that a process of this machine would see; torch, which would know, need not be installed here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def node_options(start: Start, rank: int) -> list[str]:
    """Options of `accelerate launch` beside its file."""
    options = ["--machine_rank", str(rank)] if start.nodes > 1 else []
    if start.cpu and "OMP_NUM_THREADS" not in os.environ:
        # accelerate would give each process one thread, whatever the machine has.
        threads = max(1, cores() * start.nodes // start.processes)
        options += ["--num_cpu_threads_per_process", str(threads)]
    return options


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def show(start: Start, asked: Namespace, options: Sequence[str]) -> None:
    """Say on standard error what it amounts to, as lines for a shell."""
    own = ["--processes", str(start.processes), "--strategy", start.strategy]
    own += ["--cpu"] if start.cpu else []
    if start.nodes > 1:
        own += ["--nodes", str(start.nodes), "--address", start.address, "--port", str(start.port)]
    command = ["accelerate", "launch", "--config_file", "accelerate.yaml", *node_options(start, asked.rank)]
    lines = ["export ACCELERATE_USE_CPU=true"] if start.cpu else []
    lines += [f"python -m launch config {shlex.join(own)} > accelerate.yaml"]
    lines += [shlex.join([*command, asked.recipe, *options])]
    print("launch: this amounts to\n" + "".join(f"  {line}\n" for line in lines), file=sys.stderr, flush=True)


def _examine(start: Start, asked: Namespace, options: Sequence[str]) -> int:
    """Let the doctor look: 0 where all is well, 2 where there is something to mend, 75 after a signal."""
    words = ["doctor"]
    if start.nodes > 1:
        meeting = f"{start.address}:{start.port}"
        words += ["--nodes", str(start.nodes), "--rank", str(asked.rank), "--rendezvous", meeting]
    command = [sys.executable, "-m", "toolkit.cli", *words, "--", asked.recipe, *options]
    with Parent(DOCTORS_GRACE) as parent:
        well = parent.run(command, os.environ)
        if parent.asked:
            return run.RESUMABLE
    if not well:
        print("launch: nothing was started (without a doctor, it is started all the same)", file=sys.stderr, flush=True)
    return 0 if well else run.USER_ERROR


def _obey() -> None:
    """Signals from whoever started this over a line that passes none on; when the line breaks, the run is to save."""
    for line in sys.stdin:
        number = getattr(signal, line.strip(), None)
        if isinstance(number, signal.Signals):
            os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
