"""`python -m launch ssh HOSTS RECIPE --processes P -- OPTIONS`: a few machines without a scheduler.

HOSTS is a file with a host a line, the first of which is where the ranks meet. On each, over one ssh, runs
`python -m launch local`, in this folder and with this Python, which all of them must have in the same place; and before
that, `toolkit doctor`. What they print comes here with the host in front. A signal to this process reaches
all ranks, as does the end of it; one host that fails ends all.

Of the environment only what `PASSED_ON` names goes along, since a command line can be read by others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from launch.errors import UserError
from launch.local import PORT, add_arguments, divide
from launch.processes import MARGIN, SAME_WISH, SIGNALS, TICK
from launch.run import CRASHED, RESUMABLE, USER_ERROR

PASSED_ON = re.compile(
    r"(NCCL|GLOO|FI|UCX|OMP|CUDA)_[A-Z0-9_]+|PYTHONPATH|TOOLKIT_CACHE|HF_HOME|HF_(HUB|DATASETS)_OFFLINE"
    r"|TRANSFORMERS_OFFLINE|XDG_CACHE_HOME"
)
"""Names of variables."""

UNREACHED = 255
"""What ssh ends with where it does not connect."""


def main(argv: Sequence[str]) -> int:
    """Start a recipe on several machines; the exit code is the job's, as of `launch run`.

    Raises:
        UserError: what cannot start.
    """
    parser = ArgumentParser(
        prog="python -m launch ssh",
        usage="%(prog)s HOSTS RECIPE [--processes P] [--cpu] [--strategy S] [--restarts N] [--dry-run] -- OPTIONS",
        allow_abbrev=False,
    )
    parser.description = "Start a recipe on the machines of a file, over ssh."
    parser.add_argument("hosts", metavar="HOSTS", type=Path, help="file with a host (or user@host) a line")
    add_arguments(parser)
    parser.add_argument("--address", default="", help="of the first host for the others (default: its name)")
    parser.add_argument("--port", type=int, default=PORT, help="on the first host (default: %(default)s)")
    parser.add_argument("--ssh-config", metavar="FILE", help="for ssh -F")
    parser.add_argument("--directory", default=str(Path.cwd()), help="on each host (default: this one)")
    parser.add_argument("--python", default=sys.executable, help="on each host (default: this one)")
    parser.add_argument("--skip-doctor", action="store_true", help="start without looking at the machines first")
    own, options = divide(argv)
    asked = parser.parse_args(own)
    hosts = read_hosts(asked.hosts)
    _check(asked, hosts)
    commands = {host: _command(asked, hosts, rank, options) for rank, host in enumerate(hosts)}
    if asked.dry_run:
        for command in commands.values():
            print(shlex.join(command))
        return 0
    with Crew(asked.grace) as crew:
        return _attempts(crew, commands, asked.restarts)


def read_hosts(file: Path) -> list[str]:
    """The hosts that a file names, in its order; what stands behind # is not for us.

    Raises:
        UserError: it cannot be read, is empty, names a host twice, or something that is none.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', error)}") from error
    hosts = [line for line in lines if line]
    for host in hosts:
        if not re.fullmatch(r"([\w.-]+@)?\w[\w.-]*", host):  # nothing that ssh would take for an option
            raise UserError(f"{file}: {host!r} is no host; write HOST or USER@HOST, and the rest into ~/.ssh/config")
    if not hosts:
        raise UserError(f"{file} names no host")
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise UserError(f"{file} names {twice[0]} twice: --processes says how many ranks a host has")
    return hosts


def _check(asked: Namespace, hosts: Sequence[str]) -> None:
    if not Path(asked.directory, asked.recipe).is_file() and Path(asked.directory) == Path.cwd():
        raise UserError(f"there is no recipe {asked.recipe}")
    if asked.processes is None or asked.processes < 1:
        raise UserError("how many ranks is a host to have? Say --processes P")
    if asked.restarts < 0 or asked.grace <= 0:
        raise UserError("--restarts is at least 0, and --grace more than 0")
    if len(hosts) * asked.processes == 1 and asked.strategy != "ddp":
        raise UserError(f"{asked.strategy} needs at least two processes")


def _attempts(crew: Crew, commands: Mapping[str, Sequence[str]], restarts: int) -> int:
    for attempt in range(1, restarts + 2):
        code = crew.run(commands)
        if code in (0, USER_ERROR) or crew.asked or attempt > restarts:
            return code
        what = "stopped itself" if code == RESUMABLE else "crashed"
        print(f"launch: the job {what}; restart {attempt} of {restarts}", file=sys.stderr, flush=True)
    return CRASHED


def _command(asked: Namespace, hosts: Sequence[str], rank: int, options: Sequence[str]) -> list[str]:
    """What starts this host's ranks. The far end's shell gets one string, of which each word is quoted."""
    words = ["launch", "local", asked.recipe, "--processes", str(asked.processes), "--strategy", asked.strategy]
    words += ["--grace", str(asked.grace), "--obey", *(["--cpu"] if asked.cpu else [])]
    words += [] if asked.skip_doctor else ["--doctor"]
    if len(hosts) > 1:
        address = asked.address or hosts[0].rpartition("@")[2]
        words += ["--nodes", str(len(hosts)), "--rank", str(rank), "--address", address, "--port", str(asked.port)]
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if PASSED_ON.fullmatch(name)]
    command = shlex.join(["env", *variables, asked.python, "-m", *words, "--", *options])
    # No terminal: a password could not be asked for. A line that has gone dead is noticed within a minute.
    own = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=20", "-o", "ServerAliveCountMax=3"]
    own += ["-F", asked.ssh_config] if asked.ssh_config else []
    return ["ssh", *own, "--", hosts[rank], f"cd {shlex.quote(asked.directory)} && exec {command}"]


class Crew:
    """One command on each host, again and again; a context around them, in which signals are passed on to all.

    Args:
        grace: seconds between a signal, or the failure of one, and the end of the others.

    Attributes:
        asked: the signal that came first; 0 while none has come.
    """

    def __init__(self, grace: float) -> None:
        self.asked = 0
        self._since = 0.0
        self._insisted = False
        self._grace = grace
        self._lines: dict[str, subprocess.Popen[str]] = {}
        self._former: list[tuple[int, object]] = []

    def __enter__(self) -> Crew:
        self._former = [(number, signal.signal(number, self._pass_on)) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former:
            signal.signal(number, former)  # type: ignore[arg-type]

    def run(self, commands: Mapping[str, Sequence[str]]) -> int:
        """Start these, by host, and wait for the end of all; one that fails ends the others.

        Returns:
            0 where all ended well; else 1 where one crashed or was not reached, 2 after a mistake of the user, 75.
        """
        # A session of their own: a terminal's Ctrl-C would end ssh before it could pass anything on.
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._lines = {
            host: subprocess.Popen(command, start_new_session=True, errors="replace", **options)  # type: ignore
            for host, command in commands.items()
        }
        readers = [
            threading.Thread(target=_print, args=(host, line.stdout), daemon=True) for host, line in self._lines.items()
        ]
        for reader in readers:
            reader.start()
        if self.asked:
            self._say(self.asked)  # it came meanwhile
        failed_at = 0.0
        while None in (codes := [line.poll() for line in self._lines.values()]):
            now = time.monotonic()
            if any(codes) and not (failed_at or self.asked):  # a second one would not let them save
                failed_at = now
                self._say(signal.SIGTERM)
            since = self._since or failed_at
            if self._insisted or (since and now > since + self._grace + 2 * MARGIN):
                for line in self._lines.values():
                    line.kill()
            time.sleep(TICK)
        for reader in readers:
            reader.join(5)
        return self._verdict()

    def _verdict(self) -> int:
        for host, line in self._lines.items():
            if line.returncode:
                lost = line.returncode == UNREACHED
                why = "ssh did not reach it, or lost it" if lost else f"it ended with {line.returncode}"
                print(f"launch: {host}: {why}", file=sys.stderr, flush=True)
        if self._insisted:
            return 128 + self.asked
        found = {line.returncode for line in self._lines.values()} - {0}
        if found - {USER_ERROR, RESUMABLE}:
            return CRASHED
        return USER_ERROR if USER_ERROR in found else RESUMABLE if found else 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = number, now
            self._say(number)
        elif now - self._since > SAME_WISH:
            self._insisted = True

    def _say(self, number: int) -> None:
        """The name of a signal to all, as `launch local --obey` takes it."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # it has ended
                assert line.stdin is not None
                line.stdin.write(f"{signal.Signals(number).name}\n")
                line.stdin.flush()


def _print(host: str, output: IO[str]) -> None:
    for line in output:
        print(f"[{host}] {line.rstrip()}", flush=True)
