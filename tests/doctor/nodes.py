"""Nodes that are none: each with a network, a host name, files for its names and a view of the disks of its own.

They hang on the bridge of `benchmarks.scaling_net`. A wire between a node and the bridge can be made bad: frames pass
through a process that delays and drops them, as `tc qdisc … netem` would, which not every kernel has.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scaling_net import INTERFACE, Network

ROOT = Path(__file__).resolve().parents[2]
WIRE = Path(__file__).with_name("wire.py")
PORT = 29411
DOCTOR = (sys.executable, "-m", "toolkit.cli", "doctor")


@dataclass
class Nodes:
    """`node0`, `node1` … as long as the network lasts.

    Attributes:
        network: their namespaces.
        folder: for what they write; shared by all of them.
    """

    network: Network
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def prepare(self) -> None:
        """Write the files that give their names addresses."""
        names = [f"{self.network.address(node)} node{node}" for node in range(self.network.size)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(names) + "\n")

    def start(
        self, node: int, *words: str, environment: Mapping[str, str] | None = None, before: str = ""
    ) -> subprocess.Popen[str]:
        """A command on a node.

        Args:
            node: where.
            words: the command.
            environment: beside this process's own.
            before: lines of a shell in the node's own mount and network namespace, before it.
        """
        script = f'hostname node{node}; mount --bind "$0" /etc/hosts\n{before}\nexec "$@"'
        inside = ["unshare", "--mount", "--uts", "bash", "-ec", script, str(self.folder / "hosts")]
        process = subprocess.Popen(
            [*self.network.inside(node, node % (os.cpu_count() or 1)), *inside, *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def doctor(self, node: int, *words: str, **options: Any) -> subprocess.Popen[str]:
        """`toolkit doctor --json` of all nodes, on one of them; `words` may say otherwise."""
        meeting = ["--nodes", str(self.network.size), "--rank", str(node), "--rendezvous", f"node0:{PORT}"]
        return self.start(node, *DOCTOR, "--json", *meeting, *words, **options)

    def end(self) -> None:
        """Leave no process."""
        for process in self.processes:
            process.kill()
            process.communicate()

    @contextlib.contextmanager
    def bad_wire(self, node: int, *, delay: float, loss: float) -> Iterator[None]:
        """Between a node and the bridge, frames take `delay` seconds each way, and a share of `loss` is lost."""
        space, hub = self.network.space(node), self.network.hub
        command = [sys.executable, str(WIRE), space, INTERFACE, hub, f"port{node}", str(delay), str(loss)]
        address = f"{self.network.address(node)}/24"
        with subprocess.Popen([*command, address], stdout=subprocess.PIPE, text=True) as wire:
            try:
                assert wire.stdout is not None
                assert wire.stdout.readline() == "ready\n"
                yield
            finally:
                wire.kill()


@dataclass(frozen=True)
class Seen:
    """What a doctor has said: its exit code, its findings, all of its JSON, and its standard error."""

    code: int
    findings: Sequence[Mapping[str, str]]
    figures: Mapping[str, Any]
    seconds: float
    err: str

    def find(self, severity: str, check: str) -> list[str]:
        """`where: what` of these findings."""
        return [f"{f['where']}: {f['what']}" for f in self.findings if (f["severity"], f["check"]) == (severity, check)]

    @property
    def errors(self) -> set[str]:
        """The checks that found errors."""
        return {f["check"] for f in self.findings if f["severity"] == "error"}


def outcome(process: subprocess.Popen[str], timeout: float = 90) -> Seen:
    """Of a doctor that was started with --json."""
    began = time.monotonic()
    out, err = process.communicate(timeout=timeout)
    said = json.loads(out) if out.startswith("{") else {}
    seconds = said.get("seconds", time.monotonic() - began)
    return Seen(process.returncode, said.get("findings", []), said.get("figures", {}), seconds, err)
