"""This node, examined by itself: probes that were begun at once, and what they have found by the time it is asked."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolkit.doctor.compare import check_hub, check_packages
from toolkit.doctor.disks import check_disks
from toolkit.doctor.findings import Finding, ok
from toolkit.doctor.host import check_limits, check_name, own_names
from toolkit.doctor.probes import Probe
from toolkit.fingerprint import code_files, package_versions
from toolkit.samples import cache_folder

MEET, MEASURE, FACTS, SHARED, TELL = 0.35, 0.62, 0.8, 0.9, 0.97
"""Shares of the time by which each part has to be over."""


class Budget:
    """The time that all of it may take.

    Args:
        began: by `time.monotonic`.
        seconds: from then on.
    """

    def __init__(self, began: float, seconds: float) -> None:
        self.began = began
        self.seconds = seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; 0 from then on."""
        return max(0.0, self.began + share * self.seconds - time.monotonic())

    def shorten(self, left: float) -> None:
        """There are no more than so many seconds left: others began earlier."""
        self.began -= max(0.0, self.left() - left)


@dataclass
class Examined:
    """What an examination gives.

    Attributes:
        findings: of all checks.
        names: of the nodes.
        figures: what was measured, fit for JSON.
        told_by: the node that shows all this; empty where it is this one.
    """

    findings: list[Finding] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    told_by: str = ""


class Node:
    """This machine; a context in which its probes live.

    Args:
        recipe: file of the recipe that is to be started; None for none.
        options: of the recipe.
        nodes: of the job.
        budget: of time.

    Attributes:
        name: of the machine.
    """

    def __init__(self, recipe: Path | None, options: Sequence[str], nodes: int, budget: Budget) -> None:
        self.name = socket.gethostname()
        self.budget = budget
        self._nodes = nodes
        self._recipe_file = recipe
        self._probes: list[Probe] = []
        # Beside them the name is asked for, and the limits are read: so they come first.
        self._collectives = [self._start("collectives") for _ in range(2 if nodes == 1 else 1)]
        self._recipe = self._start("recipe", str(recipe), *options) if recipe else None
        self._gpus = self._start("gpus")
        self._disks = self._start("disks")
        self._names = own_names()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._disks.say(None)
        self._disks.finish(0.5)
        for probe in self._probes:
            probe.kill()

    def facts(self, leave: str = "") -> dict[str, Any]:
        """What this node is made of and what was found here, fit for JSON.

        Args:
            leave: a token to leave in the run's folder, for the others to find.
        """
        budget = self.budget
        settings = self._recipe.wait_for("settings", budget.left(MEASURE)) if self._recipe else None
        known = self._recipe is None or settings is not None
        run = str(self._recipe.found["run"] if self._recipe and settings else Path("runs").absolute())
        self._disks.say({"folders": {"run folder": run, "cache": str(cache_folder())}, "leave": leave})
        disks = self._disks.wait_for("disks", min(15.0, budget.left(FACTS)))
        gpus = self._gpus.wait_for("gpus", budget.left(FACTS)) or {"names": [], "driver": "", "findings": []}
        library = self._collectives[0].wait_for("torch", budget.left(FACTS))
        findings = [check_name(self._names, self._nodes), *check_limits(len(gpus["names"])), check_packages(self.name)]
        findings += [*check_disks(disks, self.name), *map(Finding.read, gpus["findings"]), *self._check_torch(library)]
        told: dict[str, Any] = {
            "name": self.name,
            "versions": package_versions(),
            "machine": self._machine(gpus),
            "code": code_files([self._recipe_file] if self._recipe_file else []),
            "run": run if known else "",
            "at": (disks or {}).get("run folder", {}).get("at", ""),
        }
        if self._recipe:
            told |= self._settings(findings)
        return told | {"findings": [asdict(finding) for finding in findings]}

    def sees(self, folder: str, token: str) -> bool | None:
        """Whether what the first node has left in a folder is here too; None where the file system does not say."""
        self._disks.say({"find": {"folder": folder, "token": token}})
        shared: bool | None = self._disks.wait_for("shared", self.budget.left(SHARED))
        return shared

    def devices(self) -> int:
        """GPUs that torch sees."""
        self._collectives[0].wait_for("torch", self.budget.left(MEASURE))
        return int(self._collectives[0].found.get("devices", 0))

    def add_members(self, number: int) -> None:
        """So many processes are to take part in the collectives of this node."""
        while len(self._collectives) < number:
            self._collectives.append(self._start("collectives"))

    def measure(
        self, asked: Mapping[str, Any], first_rank: int, meet: Callable[[int | None], int | None]
    ) -> dict[str, list[dict[str, Any]]]:
        """Let this node's members take part in all-reduce.

        Args:
            asked: what they are told, as `collectives` reads it, without rank, port and device.
            first_rank: of its members.
            meet: given the port of the store where this node has it, else None, gives it to all.

        Returns:
            What each member found, by backend.
        """
        seconds = self.budget.left(MEASURE)
        told = {**asked, "seconds": seconds}
        port: int | None = 0
        if first_rank == 0:
            self._collectives[0].say(told | {"rank": 0, "port": 0, "device": 0})
            port = self._collectives[0].wait_for("port", seconds)
        port = meet(port if first_rank == 0 else None)
        found: dict[str, list[dict[str, Any]]] = {"gloo": [], "nccl": []}
        if port is None:
            return found
        for number, probe in enumerate(self._collectives):
            if first_rank + number:
                probe.say(told | {"rank": first_rank + number, "port": port, "device": number})
        for backend, results in found.items():
            if backend == "nccl" and not asked["nccl"]:
                continue
            for probe in self._collectives:
                result = probe.wait_for(backend, self.budget.left(MEASURE))
                results.append(result or {"error": probe.complaint or "it did not end in time"})
        return found

    def _start(self, module: str, *arguments: str) -> Probe:
        probe = Probe(f"toolkit.doctor.{module}", arguments)
        self._probes.append(probe)
        return probe

    def _machine(self, gpus: Mapping[str, Any]) -> dict[str, str]:
        """Versions of what no package manager of Python's installs."""
        nccl = self._collectives[0].found.get("nccl", "")
        return {name: said for name, said in (("driver", gpus["driver"]), ("nccl", nccl)) if said}

    def _check_torch(self, version: str | None) -> list[Finding]:
        if version:
            return [ok("torch", f"{version} can be imported", self.name)]
        if self._collectives[0].running:
            mend = "See whether the file system of the environment is slow, or the machine busy."
            return [
                Finding("warning", "torch", "it was not imported in time", self.name, "all ranks wait for it", mend)
            ]
        reason = (self._collectives[0].complaint or "it said nothing").splitlines()[-1]
        mend = "Try `python -c 'import torch'`, and install it anew: pip install -c constraints.txt -e ."
        return [Finding("error", "torch", f"it cannot be imported: {reason}", self.name, "all ranks need it", mend)]

    def _settings(self, findings: list[Finding]) -> dict[str, Any]:
        """What the recipe's own process has said of settings and data."""
        assert self._recipe is not None
        ended = self._recipe.finish(self.budget.left(FACTS))
        told, reason = self._recipe.found, (self._recipe.complaint or "it said nothing").splitlines()[-1]
        if "hub" in told:
            findings += check_hub(self.name, told["hub"])
        if {"mistake", "data"}.isdisjoint(told):
            if ended and "settings" not in told:
                return {"mistake": f"it cannot be imported: {reason}", "remedy": "See `python RECIPE --help`."}
            part = "data" if "settings" in told else "settings"
            what = f"its {part} could not be looked at" + (f": {reason}" if ended else " in time")
            mend = "Give more time with --timeout; see with `toolkit data show RECIPE` how long it takes."
            findings.append(Finding("warning", "recipe", what, self.name, mend=mend))
        kept = ("settings", "digest", "data", "unprepared", "mistake", "remedy")
        return {key: told[key] for key in kept if key in told}
