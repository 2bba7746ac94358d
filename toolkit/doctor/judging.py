"""What the measurements between nodes say: which link or which node is dead, loses, or is slow beside the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from toolkit.doctor.findings import Finding, ok

Pair = tuple[int, int]

LOSS_ERROR, LOSS_WARNING = 0.02, 0.005
FEW_LOST = 2
"""Of all datagrams: so few may be lost on a busy machine."""
LATE, LATE_FROM, LATE_ALONE = 5.0, 0.002, 0.02
"""Times the median of the other links, and seconds at least; seconds, where there is no other link."""
SLOW = 0.25
"""Of the median bandwidth of the other links."""
SLOW_ALONE = 12.5e6
"""Bytes a second (100 Mbit/s), where there is no other link."""

_MEND = (
    "Look at the cables, ports and switch there, and whether the interface is the one that is meant "
    "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."
)


def judge_links(names: Sequence[str], told: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> list[Finding]:
    """What datagrams and connections say.

    Args:
        names: of the nodes, by rank.
        told: what `ask_all` found, by asking rank and asked rank.
    """
    pairs = _both_ways(told)
    dead = {pair for pair, ways in pairs.items() if not all(way["reached"] for way in ways)}
    findings = []
    if dead:
        reasons = {way["reason"] for pair in dead for way in pairs[pair] if way["reason"]}
        findings += _located(
            names,
            pairs,
            dead,
            lambda place, _: Finding(
                "error",
                "reachable",
                f"no connection ({', '.join(sorted(reasons))})",
                place,
                "each rank connects to each other one, on ports that the system chooses",
                "Open all ports between the nodes, and look at routes and cables.",
            ),
        )
    living = {pair: ways for pair, ways in pairs.items() if pair not in dead}
    lost = {pair: _loss(ways) for pair, ways in living.items()}
    lossy = {pair for pair, (gone, share) in lost.items() if gone > FEW_LOST and share >= LOSS_WARNING}
    findings += _located(
        names, pairs, lossy, lambda place, bad: _lossy(place, [w for pair in bad for w in pairs[pair]])
    )
    times = {pair: min(found) for pair, ways in living.items() if (found := [w["rtt"] for w in ways if w["rtt"]])}
    late = {pair for pair in times if _is_late(pair, times)}
    findings += _located(names, pairs, late, lambda place, bad: _latency(place, bad, times))
    silent = {pair for pair, ways in living.items() if not any(way["back"] for way in ways)}
    if not findings and living:
        median = f", round trip {statistics.median(times.values()) * 1e3:.2f} ms" if times else ""
        unheard = f"; {len(silent)} pass no UDP, so their loss is unknown" if silent else ""
        findings = [ok("reachable", f"{_count(living)} in both directions{median}{unheard}")]
    return findings


def judge_pairs(backend: str, names: Sequence[str], told: Mapping[str, Mapping[str, Any]], whole: Any) -> list[Finding]:
    """What all-reduce says.

    Args:
        backend: `gloo` or `nccl`.
        names: of the members, by rank.
        told: what each pair measured, by `0-1`.
        whole: what all of them measured; nothing where they did not.
    """
    pairs: dict[Pair, Mapping[str, Any]] = {}
    for name, found in told.items():
        low, _, high = name.partition("-")
        pairs[int(low), int(high)] = found
    check = f"{backend} all-reduce"
    dead = {pair for pair, found in pairs.items() if "error" in found}
    findings = _located(names, pairs, dead, lambda place, bad: _failed(check, backend, place, pairs[min(bad)]["error"]))
    rates = {pair: found["bandwidth"] for pair, found in pairs.items() if pair not in dead}
    slow = {pair for pair in rates if _is_slow(pair, rates)}
    findings += _located(names, pairs, slow, lambda place, bad: _bandwidth(check, place, bad, rates))
    if whole and "error" in whole and not dead:
        findings.append(_failed(check, backend, "", whole["error"]))
    if not told and not whole:
        findings.append(Finding("warning", check, "not measured: no two nodes were ready for it in time"))
    if not findings and rates:
        text = f"{_count(rates)}: {_rate(min(rates.values()))} to {_rate(max(rates.values()))}"
        latency = statistics.median(found["latency"] for found in pairs.values())
        all_of_them = f"; all {len(names)}: {_rate(whole['bandwidth'])}" if whole and "bandwidth" in whole else ""
        findings = [ok(check, f"{text}, a number in {latency * 1e3:.2f} ms{all_of_them}")]
    return findings


def _both_ways(told: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> dict[Pair, list[Mapping[str, Any]]]:
    pairs: dict[Pair, list[Mapping[str, Any]]] = {}
    for one, others in told.items():
        for other, found in others.items():
            pairs.setdefault((min(one, other), max(one, other)), []).append(found)
    return pairs


def _loss(ways: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """Datagrams that did not come back, and the share of losses on one way: a round trip passes the link twice."""
    heard = [way for way in ways if way["back"]]
    sent, back = sum(way["sent"] for way in heard), sum(way["back"] for way in heard)
    return sent - back, 1 - (back / sent) ** 0.5 if sent else 0.0


def _is_late(pair: Pair, times: Mapping[Pair, float]) -> bool:
    others = sorted(found for other, found in times.items() if other != pair)
    if not others:
        return times[pair] > LATE_ALONE
    # Of the better half: one node that is late may make most of the links late.
    return times[pair] > max(LATE * statistics.median(others[: (len(others) + 1) // 2]), LATE_FROM)


def _is_slow(pair: Pair, rates: Mapping[Pair, float]) -> bool:
    others = sorted(rate for other, rate in rates.items() if other != pair)
    if not others:
        return rates[pair] < SLOW_ALONE
    return rates[pair] < SLOW * statistics.median(others[len(others) // 2 :])


def _located(
    names: Sequence[str], pairs: Collection[Pair], bad: Collection[Pair], finding: Callable[[str, list[Pair]], Finding]
) -> list[Finding]:
    """A finding for each node all of whose links are bad, and one for each bad link that is left."""
    if len(bad) == len(pairs) > 1:
        return [finding("all links", sorted(bad))]
    links = {node: [pair for pair in pairs if node in pair] for node in range(len(names))}
    nodes = [node for node, own in links.items() if len(own) > 1 and set(own) <= set(bad)]
    found = [finding(f"{names[node]} (all its {len(links[node])} links)", sorted(links[node])) for node in nodes]
    left = sorted(pair for pair in bad if not set(pair) & set(nodes))
    return found + [finding(f"{names[low]} – {names[high]}", [(low, high)]) for low, high in left]


def _lossy(place: str, ways: Sequence[Mapping[str, Any]]) -> Finding:
    lost, share = _loss(ways)
    return Finding(
        "error" if share >= LOSS_ERROR else "warning",
        "loss",
        f"{share:.1%} of the packets are lost ({lost} of {sum(way['sent'] for way in ways):,} round trips)",
        place,
        "each loss stalls a collective, and with it all ranks, until it is sent again: a sound link loses none",
        _MEND,
    )


def _latency(place: str, bad: Sequence[Pair], times: Mapping[Pair, float]) -> Finding:
    others = [found for pair, found in times.items() if pair not in bad]
    beside = f", where the median of the others is {statistics.median(others) * 1e3:.2f} ms" if others else ""
    return Finding(
        "warning",
        "latency",
        f"a packet there and back takes {statistics.median(times[pair] for pair in bad) * 1e3:.1f} ms{beside}",
        place,
        "each collective waits for it, many times a step",
        _MEND + " For links that are as they are: --strategy.name diloco.",
    )


def _bandwidth(check: str, place: str, bad: Sequence[Pair], rates: Mapping[Pair, float]) -> Finding:
    others = [rate for pair, rate in rates.items() if pair not in bad]
    beside = f", where the median of the others is {_rate(statistics.median(others))}" if others else ""
    return Finding(
        "warning",
        check,
        f"{_rate(statistics.median(rates[pair] for pair in bad))}{beside}",
        place,
        "the slowest link sets the pace of all ranks",
        _MEND,
    )


def _failed(check: str, backend: str, place: str, reason: str) -> Finding:
    interface = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
    more = "" if backend == "gloo" else ", and NCCL_DEBUG=INFO to hear more"
    return Finding(
        "error",
        check,
        f"it failed: {reason}",
        place,
        "training sums its gradients in this way",
        f"Export {interface} with the name of the interface between the nodes (`ip address`){more}.",
    )


def _rate(bytes_a_second: float) -> str:
    bits = bytes_a_second * 8
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.{0 if bits >= 1e7 else 2}f} Mbit/s"


def _count(pairs: Collection[Any]) -> str:
    return f"{len(pairs)} link{'s' * (len(pairs) != 1)}"
