"""The examination of several nodes: they meet, measure what lies between them, and compare what they are made of."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from toolkit.doctor.alone import check_port, joined, port_taken
from toolkit.doctor.compare import (
    check_clocks,
    check_data,
    check_shared,
    compare_code,
    compare_settings,
    compare_versions,
)
from toolkit.doctor.findings import Finding, ok
from toolkit.doctor.host import check_rendezvous
from toolkit.doctor.judging import judge_links, judge_pairs
from toolkit.doctor.links import Answering, Peer, ask_all
from toolkit.doctor.meeting import Meeting, NotMet, Place, host_meeting, join_meeting, names_of_job
from toolkit.doctor.node import FACTS, MEASURE, MEET, SHARED, TELL, Examined, Node

_LINK_SECONDS = 8.0


def examine_together(node: Node, place: Place, port: int) -> Examined:
    """All checks, on each node alike.

    Args:
        node: this machine.
        place: which node this is, and where they meet.
        port: of the training on the first node; 0 where it is the one of the meeting.
    """
    findings = [check_rendezvous(place.host, place.nodes)]
    own_port: list[Finding] = []
    try:
        if findings[0].severity == "error":
            raise NotMet("")
        if place.rank == 0:
            meeting, own_port = _host(node, place, port)
        else:
            meeting = join_meeting(place, node.name, node.budget.left(MEET))
        meeting.until = node.budget.began + node.budget.seconds
        try:
            return _examine(node, meeting, [*findings, *own_port])
        finally:
            meeting.close()
    except NotMet as error:
        if str(error):
            findings.append(_not_met(node, place, str(error)))
    except _PortTaken as taken:
        findings.append(taken.finding)
    facts = node.facts()
    findings += [*map(Finding.read, facts["findings"]), *check_data([node.name], {0: facts})]
    return Examined(findings, [node.name])


class _PortTaken(Exception):
    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def _host(node: Node, place: Place, port: int) -> tuple[Meeting, list[Finding]]:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        listener = socket.create_server(("", place.port), family=family, backlog=place.nodes + 16)
    except OSError as error:
        raise _PortTaken(port_taken(place.port, node.name, error)) from error
    with listener:
        found = [check_port(port, node.name, needed=True)] if port and port != place.port else []
        found = found or [ok("port", f"{place.port} is free", node.name)]
        return host_meeting(place, listener, node.budget.left(MEET)), found


def _not_met(node: Node, place: Place, reason: str) -> Finding:
    return Finding(
        "error",
        "rendezvous",
        f"the first node was not met at {place.text}: {reason}",
        node.name,
        "all ranks meet there before anything else",
        "See that rank 0 was started on that node at the same time, and that no firewall closes the port.",
    )


def _examine(node: Node, meeting: Meeting, findings: list[Finding]) -> Examined:
    """From the first word to the last, which is the same on all nodes."""
    budget, place = node.budget, meeting.place
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with Answering(family) as answering:
        hello = {"name": node.name, "tcp": answering.tcp, "udp": answering.udp, "left": budget.left()}
        hellos = meeting.exchange(hello, 3.0)
        budget.shorten(min(said["left"] for said in hellos.values()))
        addresses = {rank: meeting.address_of(rank) for rank in hellos if rank} if not place.rank else {}
        addresses = {int(rank): at for rank, at in meeting.exchange(addresses, 3.0)[0].items()}
        if place.rank:
            addresses[0] = meeting.address_of(0)
        peers = {r: Peer(addresses[r], s["tcp"], s["udp"]) for r, s in hellos.items() if r != place.rank}
        clocks = meeting.clock_offsets()
        links = meeting.exchange(ask_all(peers), _LINK_SECONDS)
    ranks = sorted(links)
    names = [hellos[rank]["name"] for rank in ranks]
    told = {ranks.index(a): {ranks.index(int(b)): f for b, f in said.items()} for a, said in links.items()}
    measured = _all_reduce(node, meeting, ranks, told)
    token = secrets.token_hex(8)
    facts = meeting.exchange(node.facts(leave="" if place.rank else token) | {"token": token}, budget.left(FACTS) + 1)
    shared = node.sees(facts[0]["at"], facts[0]["token"]) if place.rank and facts[0]["at"] else None
    for rank, seen in meeting.exchange(shared, budget.left(SHARED) + 1).items():
        facts[rank]["shared"] = seen
    if place.rank == 0:
        findings += _judged(meeting, hellos, clocks, facts)
        findings += judge_links(names, told)
        figures: dict[str, Any] = {"links": told, "clocks": clocks}
        for backend, results in measured.items():
            if results or backend == "gloo":
                findings += judge_pairs(backend, names, *joined(results))
                figures[backend] = joined(results)[0]
        meeting.exchange([asdict(finding) for finding in findings], budget.left(TELL))
        return Examined(findings, names, figures)
    last = meeting.exchange(None, budget.left(TELL))[0]
    return Examined([Finding.read(finding) for finding in last], names, told_by=hellos[0]["name"])


def _all_reduce(
    node: Node, meeting: Meeting, ranks: list[int], told: Mapping[int, Mapping[int, Mapping[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """What all nodes measured, by backend."""
    devices = meeting.exchange(node.devices(), node.budget.left(MEASURE))
    unreached = {(min(a, b), max(a, b)) for a, others in told.items() for b, f in others.items() if not f["reached"]}
    asked = {
        "size": len(ranks),
        "host": meeting.place.host,
        "skip": [f"{low}-{high}" for low, high in sorted(unreached)],
        "nccl": all(devices.values()),
    }
    own = ranks.index(meeting.place.rank)
    found = node.measure(asked, own, lambda port: meeting.exchange(port, node.budget.left(MEASURE))[0])
    everywhere = meeting.exchange(found, node.budget.left(MEASURE) + 1)
    return {backend: [result for said in everywhere.values() for result in said[backend]] for backend in found}


def _judged(
    meeting: Meeting, hellos: Mapping[int, Mapping[str, Any]], clocks: Any, facts: Mapping[int, Mapping[str, Any]]
) -> list[Finding]:
    """What the first node makes of what all have said, and of those who have not."""
    ranks = sorted(facts)
    ours = {ranks.index(rank): found for rank, found in facts.items()}
    names = [facts[rank]["name"] for rank in ranks]
    findings = [Finding.read(finding) for found in facts.values() for finding in found["findings"]]
    findings += _absent(meeting, hellos)
    # By all who came, since one whose clock is wrong may be one that fell silent.
    came = {rank: hello["name"] for rank, hello in hellos.items()}
    findings += check_clocks(came, clocks)
    for compare in (compare_versions, compare_code, compare_settings, check_data, check_shared):
        findings += compare(names, ours)
    return findings


def _absent(meeting: Meeting, hellos: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    nodes, job = meeting.place.nodes, names_of_job()
    findings = []
    for rank in meeting.missing:
        name = f"rank {rank} ({job[rank]})" if rank < len(job) else f"rank {rank}"
        findings.append(
            Finding(
                "error",
                "nodes",
                f"{name} did not come: {nodes - len(meeting.missing)} of {nodes} nodes are here",
                name,
                "the others would wait for it half an hour, and then fail",
                "See whether that node is up, and the log of the job there; or start with fewer nodes.",
            )
        )
    for rank in sorted(meeting.lost):
        name = hellos.get(rank, {}).get("name", f"rank {rank}")
        what = "it came, and fell silent in the middle"
        mend = "See the log of the job there, and whether the node is overloaded or its network breaks off."
        findings.append(Finding("error", "nodes", what, name, "a rank there would be lost in the same way", mend))
    for rank, places in meeting.duplicates.items():
        what = f"rank {rank} is there {len(places)} times: {', '.join(places)}"
        mend = "Give each node a --rank of its own, from 0 to one below --nodes."
        findings.append(Finding("error", "ranks", what, why="two nodes with one rank wait for ever", mend=mend))
    for stranger in meeting.strangers:
        mend = "Start all nodes with the same --nodes."
        findings.append(Finding("error", "ranks", stranger, why="they would never be complete", mend=mend))
    if not findings:
        findings.append(ok("nodes", f"all {nodes} are here, each with a rank of its own"))
    return findings
