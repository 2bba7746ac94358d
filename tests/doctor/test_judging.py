"""What the doctor makes of figures, words and processes: no other node is needed for that."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import pytest

from tests.ranks import free_port
from toolkit.doctor.collectives import rounds_of
from toolkit.doctor.compare import check_clocks, check_data, compare_versions
from toolkit.doctor.findings import Finding, as_json, merged, ok, show, verdict
from toolkit.doctor.gpus import check_gpu
from toolkit.doctor.judging import judge_links, judge_pairs
from toolkit.doctor.meeting import Meeting, NotMet, Place, host_meeting, join_meeting, names_of_job

NAMES = ("a", "b", "c", "d")


def links(size: int, **bad: Mapping[str, Any]) -> dict[int, dict[int, dict[str, Any]]]:
    """Of that many nodes, all sound but for those that are named, as `n01`."""
    sound = {"reached": True, "reason": "", "sent": 200, "back": 200, "rtt": 2e-4}
    return {
        one: {
            other: sound | dict(bad.get(f"n{min(one, other)}{max(one, other)}", {}))
            for other in range(size)
            if other != one
        }
        for one in range(size)
    }


def told(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.check, finding.where) for finding in findings]


def test_sound_links() -> None:
    (finding,) = judge_links(NAMES[:3], links(3))
    assert finding == ok("reachable", "3 links in both directions, round trip 0.20 ms")


@pytest.mark.parametrize(
    ("size", "bad", "where"),
    [
        (2, ("n01",), "a – b"),
        (3, ("n01",), "a – b"),
        (3, ("n01", "n12"), "b (all its 2 links)"),
        (4, ("n02", "n12", "n23"), "c (all its 3 links)"),
        (4, ("n01", "n02", "n03", "n12", "n13", "n23"), "all links"),
        (4, ("n01", "n12"), "a – b|b – c"),
    ],
)
def test_the_node_is_named_or_the_link(size: int, bad: tuple[str, ...], where: str) -> None:
    lossy = links(size, **{name: {"back": 180} for name in bad})
    findings = judge_links(NAMES[:size], lossy)
    assert told(findings) == [("error", "loss", place) for place in where.split("|")]
    assert "5.1% of the packets are lost" in findings[0].what  # 1 - sqrt(0.9)
    dead = links(size, **{name: {"reached": False, "reason": "no route"} for name in bad})
    assert told(judge_links(NAMES[:size], dead)) == [("error", "reachable", place) for place in where.split("|")]


def test_what_is_late_is_late_beside_the_others() -> None:
    late = {"rtt": 4e-3}
    assert told(judge_links(NAMES[:3], links(3, n01=late))) == [("warning", "latency", "a – b")]
    assert told(judge_links(NAMES[:2], links(2, n01=late)))[0][0] == "ok", "with no other link, 4 ms is a distance"
    assert told(judge_links(NAMES[:2], links(2, n01={"rtt": 0.2})))[0][:2] == ("warning", "latency")
    assert told(judge_links(NAMES[:3], links(3, n01={"rtt": 15e-4})))[0][0] == "ok", "a busy machine's is no finding"


def test_a_few_lost_on_a_busy_machine_are_no_finding() -> None:
    assert told(judge_links(NAMES[:2], links(2, n01={"back": 199})))[0][0] == "ok"
    assert told(judge_links(NAMES[:2], links(2, n01={"back": 197}))) == [("warning", "loss", "a – b")]
    (finding,) = judge_links(NAMES[:2], links(2, n01={"back": 0, "rtt": None}))
    assert "1 pass no UDP" in finding.what


def test_bandwidth_is_judged_beside_the_others() -> None:
    sound = {"latency": 1e-4, "bandwidth": 1e9}
    pairs = {"0-1": sound, "0-2": sound | {"bandwidth": 1e8}, "1-2": sound | {"bandwidth": 1.2e8}}
    (finding,) = judge_pairs("gloo", NAMES[:3], pairs, sound)
    assert (finding.severity, finding.where) == ("warning", "c (all its 2 links)")
    assert finding.what == "880 Mbit/s, where the median of the others is 8.0 Gbit/s"
    assert told(judge_pairs("nccl", NAMES[:2], {"0-1": sound | {"bandwidth": 1e7}}, {}))[0][0] == "warning"
    failed = judge_pairs("nccl", NAMES[:2], {"0-1": {"error": "unhandled system error"}}, {})
    assert failed[0].severity == "error"
    assert "NCCL_SOCKET_IFNAME" in failed[0].mend
    (fine,) = judge_pairs("gloo", NAMES[:2], {"0-1": sound}, sound)
    assert fine.what == "1 link: 8.0 Gbit/s to 8.0 Gbit/s, a number in 0.10 ms; all 2: 8.0 Gbit/s"


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 33])
def test_rounds_are_a_tournament(size: int) -> None:
    """Each plays each, and all come to their pair in the same round: nobody waits for one that waits for another."""
    own = [list(rounds_of(rank, size)) for rank in range(size)]
    assert {pair for pairs in own for pair in pairs} == {(a, b) for b in range(size) for a in range(b)}
    places = [0] * size
    played = 0
    while played < size * (size - 1) // 2:
        ready = {pair for rank, pairs in enumerate(own) if places[rank] < len(pairs) for pair in [pairs[places[rank]]]}
        both = [(a, b) for a, b in ready if own[a][places[a] :][:1] == own[b][places[b] :][:1] == [(a, b)]]
        assert both, "a circle of nodes that wait"
        for a, b in both:
            places[a] += 1
            places[b] += 1
            played += 1


def test_clocks() -> None:
    names = {0: "a", 1: "b", 2: "c"}
    assert told(check_clocks(names, {1: (0.05, 0.1), 2: (-0.9, 0.001)})) == [("ok", "clock", "")]
    assert told(check_clocks(names, {1: (5.0, 0.1), 2: (-90.0, 0.1)})) == [
        ("warning", "clock", "b"),
        ("error", "clock", "c"),
    ]
    assert check_clocks(names, {1: (1.05, 0.1)})[0].severity == "ok", "it may be the way that took so long"


def test_versions_are_held_against_those_of_most() -> None:
    one, other = {"versions": {"torch": "2.13.0"}}, {"versions": {"torch": "2.12.0", "peft": "0.18"}}
    findings = compare_versions(NAMES, {0: other, 1: one, 2: one})
    assert [(f.severity, f.where, f.what) for f in findings] == [
        ("warning", "a", "peft 0.18, where b has missing"),
        ("error", "a", "torch 2.12.0, where b has 2.13.0"),
    ]


def test_what_both_know_of_their_data_is_compared() -> None:
    """A node that has not prepared the first part does not know the fingerprint of the second."""
    prepared, not_yet = {"data": ["x", "y"], "unprepared": ""}, {"data": [], "unprepared": "x"}
    assert told(check_data(NAMES, {0: prepared, 1: not_yet})) == [("warning", "data", "b")]
    assert told(check_data(NAMES, {0: prepared, 1: not_yet | {"unprepared": "z"}})) == [("error", "data", "b")]
    assert told(check_data(NAMES, {0: prepared, 1: prepared})) == [("ok", "data", "")]


def test_a_gpu_that_is_ill() -> None:
    """By what nvidia-smi writes of an H200, and of one in a state that no test can bring about."""
    sound = {
        "index": "0",
        "name": "NVIDIA H200",
        "driver_version": "570.1",
        "memory.total": "143771",
        "memory.used": "1",
        "utilization.gpu": "0",
        "ecc.errors.uncorrected.volatile.total": "0",
        "clocks_event_reasons.active": "0x0000000000000001",
        "temperature.gpu": "30",
    }
    assert check_gpu(sound, "a") == []
    taken, ecc, hot = (
        check_gpu(sound | change, "a")
        for change in (
            {"memory.used": "20000"},
            {"ecc.errors.uncorrected.volatile.total": "3"},
            {"clocks_event_reasons.active": "0x0000000000000048"},
        )
    )
    assert "20,000 of 143,771 MiB are taken" in taken[0].what
    assert (ecc[0].severity, ecc[0].what) == ("error", "GPU 0: 3 memory errors that could not be corrected")
    assert hot[0].what == "GPU 0 is slowed: hardware slowdown, hardware thermal slowdown, at 30 °C"
    assert check_gpu(sound | {"ecc.errors.uncorrected.volatile.total": "[N/A]"}, "a") == []


def test_what_is_said_alike_of_several_nodes_stands_once() -> None:
    findings = [ok("x", "fine", "a"), Finding("error", "y", "bad", "a"), ok("x", "fine", "b")]
    assert merged(findings) == [Finding("error", "y", "bad", "a"), ok("x", "fine", "a, b")]
    assert (verdict(findings), verdict(findings[:1]), verdict([])) == ("error", "ok", "ok")
    said = json.loads(as_json(merged(findings), ["a", "b"], 1.234, {"links": {}}))
    assert (said["verdict"], said["seconds"], said["nodes"]) == ("error", 1.23, ["a", "b"])
    assert said["findings"][0] == {
        "severity": "error",
        "check": "y",
        "what": "bad",
        "where": "a",
        "why": "",
        "mend": "",
    }


def test_the_table_says_why_and_how_to_mend() -> None:
    text = io.StringIO()
    with redirect_stdout(text):
        show([Finding("error", "clock", "word " * 40, "a", "because", "do it"), ok("port", "free")], ["a"], 2.0)
    lines = text.getvalue().splitlines()
    assert lines[0] == "✓ port   free"
    assert lines[1].startswith("✗ clock  a: word word")
    assert all(line.startswith(" " * 9 + "word") for line in lines[2:4])
    assert [line.strip() for line in lines if "because" in line or "do it" in line] == ["why: because", "→ do it"]
    assert lines[-1] == "1 node, 2.0 s: 1 error, 0 warnings"
    assert all(line == line.rstrip() and len(line) <= 100 for line in lines)


# The meeting


def meet(port: int, *others: tuple[int, int], nodes: int = 3, seconds: float = 1.0) -> tuple[Meeting, dict[str, Any]]:
    """The first node's meeting with others of (rank, nodes), and what became of those."""
    results: dict[str, Any] = {}

    def join(number: int, rank: int, size: int) -> None:
        try:
            results[f"{number}"] = join_meeting(Place(rank, size, "127.0.0.1", port), f"node{rank}", 5.0)
        except NotMet as error:
            results[f"{number}"] = str(error)

    threads = [threading.Thread(target=join, args=(i, *other)) for i, other in enumerate(others)]
    with socket.create_server(("127.0.0.1", port)) as listener:
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        meeting = host_meeting(Place(0, nodes, "127.0.0.1", port), listener, seconds)
    for thread in threads:
        thread.join()
    return meeting, results


def test_all_meet_and_hear_one_another() -> None:
    meeting, others = meet(free_port(), (1, 3), (2, 3))
    assert meeting.missing == []
    heard: dict[int, Any] = {}

    def say(rank: int, other: Meeting) -> None:
        heard[rank] = (other.exchange(f"from {rank}", 5.0), other.clock_offsets())

    threads = [threading.Thread(target=say, args=(rank, others[str(rank - 1)])) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    everything = {0: "from 0", 1: "from 1", 2: "from 2"}
    assert meeting.exchange("from 0", 5.0) == everything
    clocks = meeting.clock_offsets()
    for thread in threads:
        thread.join()
    assert heard == {1: (everything, {}), 2: (everything, {})}
    assert all(abs(ahead) < 0.05 and 0 < uncertain < 0.05 for ahead, uncertain in clocks.values())


def test_one_that_falls_silent_is_left_out_and_holds_up_nobody_for_long() -> None:
    meeting, others = meet(free_port(), (1, 3), (2, 3))
    talking = threading.Thread(target=others["0"].exchange, args=("here", 5.0))
    talking.start()
    began = time.monotonic()
    assert meeting.exchange("first", 0.5) == {0: "first", 1: "here"}
    talking.join()
    assert time.monotonic() - began < 2
    assert meeting.lost == {2}


def test_ranks_that_are_there_twice_and_jobs_of_another_size() -> None:
    meeting, others = meet(free_port(), (1, 3), (1, 3), (0, 3), (2, 4))
    assert meeting.missing == [2]
    assert meeting.duplicates == {1: ["127.0.0.1", "node1 (127.0.0.1)"], 0: ["127.0.0.1", "node0 (127.0.0.1)"]}
    assert meeting.strangers == ["node2 (127.0.0.1): it was started with --nodes 4, and the first node with --nodes 3"]
    assert isinstance(others["0"], Meeting)
    assert [others[key] for key in "12"] == ["--rank 1 is there twice", "--rank 0 is there twice"]


def test_nobody_there() -> None:
    began = time.monotonic()
    with pytest.raises(NotMet, match=r"Connection refused \(tried for 1 s\)"):
        join_meeting(Place(1, 2, "127.0.0.1", free_port()), "b", 1.0)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("a,b-2", ["a", "b-2"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]-x,y[3]", ["r1-x", "r2-x", "y3"]),
    ],
)
def test_the_nodes_of_a_job(said: str, names: list[str]) -> None:
    assert names_of_job({"SLURM_JOB_NODELIST": said}) == names
