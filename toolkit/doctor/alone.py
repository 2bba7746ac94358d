"""The examination of one machine."""

from __future__ import annotations

import contextlib
import socket

import psutil

from toolkit.doctor.compare import check_data
from toolkit.doctor.findings import Finding, Severity, ok
from toolkit.doctor.host import check_rendezvous
from toolkit.doctor.judging import judge_pairs
from toolkit.doctor.meeting import Place
from toolkit.doctor.node import Examined, Node

USUAL_PORT = 29500
"""Of `accelerate launch` and torchrun, where nothing else is said."""


def examine_alone(node: Node, place: Place, port: int) -> Examined:
    """All checks that need no other node; processes of this one stand for its ranks.

    Args:
        node: this machine.
        place: where ranks would meet; nowhere, where none was named.
        port: of the training; 0 for that of the place, else the usual one.
    """
    members = max(2, node.devices())
    node.add_members(members)
    gpus = node.devices() if node.devices() > 1 else 0
    asked = {"size": members, "host": "127.0.0.1", "skip": [], "nccl": bool(gpus)}
    measured = node.measure(asked, 0, lambda port: port)
    facts = node.facts()
    findings = [check_rendezvous(place.host, 1)] if place.host else []
    port = port or place.port
    findings += [*map(Finding.read, facts["findings"]), check_port(port or USUAL_PORT, node.name, needed=bool(port))]
    findings += check_data([node.name], {0: facts})
    figures = {}
    for backend, results in measured.items():
        if results or backend == "gloo":
            names = [f"GPU {number}" if gpus else f"rank {number}" for number in range(members)]
            findings += judge_pairs(backend, names, *joined(results))
            figures[backend] = joined(results)[0]
    return Examined(findings, [node.name], figures)


def joined(results: list[dict[str, object]]) -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """What members measured, put together: by pair, an error before a figure; and of all of them."""
    pairs: dict[str, dict[str, object]] = {}
    whole: dict[str, object] = {}
    for result in results:
        if "error" in result:
            whole = result
            continue
        for name, found in dict(result["pairs"]).items():  # type: ignore[call-overload]
            if name not in pairs or "error" in found:
                pairs[name] = found
        whole = whole or dict(result["all"])  # type: ignore[call-overload]
    return pairs, whole


def check_port(port: int, node: str, *, needed: bool) -> Finding:
    """Whether a server could listen there."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            listener.bind(("", port))
            listener.listen()
    except OSError as error:
        return port_taken(port, node, error, "error" if needed else "warning")
    return ok("port", f"{port} is free", node)


def port_taken(port: int, node: str, error: OSError, severity: Severity = "error") -> Finding:
    """Who has the port, where the system says."""
    who = ""
    with contextlib.suppress(psutil.Error, OSError):
        for line in psutil.net_connections("tcp"):
            if line.status == psutil.CONN_LISTEN and line.laddr.port == port and line.pid:
                who = f" by {psutil.Process(line.pid).name()} (process {line.pid})"
    return Finding(
        severity,
        "port",
        f"{port} is taken{who}" if who else f"{port} cannot be listened on: {error.strerror}",
        node,
        "the first rank listens there, and the others would meet somebody else",
        "End that process, or take another port: --main_process_port of accelerate launch, --rendezvous here.",
    )
