"""The parts of a step's time as a table for the report, with one sentence on what can be won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.profiler.parts import (
    CHECKPOINT,
    COMMUNICATION,
    COMPUTE,
    DATA,
    HOST,
    PADDING,
    PARTS,
    WAITING,
    RankTimes,
)

WORTH_IT = 0.05
"""Share of a step below which a part is not worth a word."""
_ADVICE = {
    DATA: "Waiting for data takes {share} of a step: raise --data.workers.",
    COMMUNICATION: "Communication that nothing hides takes {share} of a step: {cure}.",
    WAITING: "Waiting for other ranks takes {share} of a step, and rank {last} waits least: {cure}.",
    HOST: "Python, launching and logging take {share} of a step: give each launch more to do with a larger "
    "--train.micro_batch.",
    PADDING: "Computing on padding takes {share} of a step: {cure}.",
    CHECKPOINT: "Copying for checkpoints takes {share} of a step: save less often, with a larger --checkpoint.every.",
}


def table(ranks: Sequence[RankTimes], parts: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json holds as `profile`; seconds are of one step, and the mean over the ranks.

    Args:
        ranks: as measured.
        parts: of each rank, by `all_ranks`.
        facts: `padding_free` (it is in force), `padding` (the setting), `sharded` (weights are gathered in each step).
    """
    steps, size = min(len(rank.exposed) for rank in ranks), len(ranks)
    wall = sum(rank.wall for rank in ranks) / size / steps
    rows, shares = [], {}
    for part in PARTS:
        own = [seconds[part] / steps for seconds in parts]
        mean = sum(own) / size
        shares[part] = mean / wall
        rows.append({"part": part, "seconds": mean, "share": mean / wall, "least": min(own), "most": max(own)})
    return {
        "steps": steps,
        "ranks": size,
        "seconds": wall,
        "parts": rows,
        "hidden_communication": sum(rank.hidden for rank in ranks) / size / steps,
        "padding_of_tokens": sum(rank.padding for rank in ranks) / size,
        "advice": advice(
            shares,
            last=min(range(size), key=lambda rank: parts[rank][WAITING]),
            last_is_late_for_data=_late_for_data(parts),
            **facts,
        ),
    }


def advice(
    shares: Mapping[str, float],
    *,
    last: int = 0,
    last_is_late_for_data: bool = False,
    padding_free: bool = False,
    padding: str = "auto",
    sharded: bool = False,
) -> str:
    """One sentence about the largest part that can be avoided, and which setting helps."""
    part = max((part for part in PARTS if part != COMPUTE), key=lambda part: shares[part])
    if shares[part] < WORTH_IT:
        return f"Computing takes {_percent(shares[COMPUTE])} of a step: nothing else is worth a change."
    cures = {
        COMMUNICATION: "let the ranks exchange less often, with a larger --train.global_batch"
        + (", or copy the weights to each rank with --strategy.name ddp where they fit" if sharded else ""),
        WAITING: "it waits for data, so raise --data.workers"
        if last_is_late_for_data
        else "see what else its machine does; a larger --train.global_batch makes the ranks wait less often",
        PADDING: "its rows are filler, for a --train.global_batch that the rows do not fill"
        if padding_free
        else "leave --train.padding_free at auto"
        if padding == "off"
        else "a smaller --train.micro_batch pads less",
    }
    return _ADVICE[part].format(share=_percent(shares[part]), last=last, cure=cures.get(part, ""))


def _late_for_data(parts: Sequence[Mapping[str, float]]) -> bool:
    """Whether the rank that waits least spends clearly more on data than the others do, which explains their wait."""
    last = min(parts, key=lambda seconds: seconds[WAITING])
    others = [seconds for seconds in parts if seconds is not last]
    waited = sum(seconds[WAITING] for seconds in others) / max(1, len(others))
    usual = sum(seconds[DATA] for seconds in others) / max(1, len(others))
    return bool(others) and last[DATA] - usual > 0.5 * waited


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
