"""The parts of a step's time, from the events of a trace. Pure functions: every instant of a step has one part.

On a CPU, the innermost event of the main thread decides; where that is code around operators, and a collective is in
flight meanwhile, the step waits for it. On a GPU, what runs there decides, and only where it idles the main thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from toolkit.profiler.spans import PREFIX

COMPUTE, COMMUNICATION, DATA, HOST, CHECKPOINT = "compute", "communication", "data", "host", "checkpoint"
PADDING, WAITING = "padding", "waiting"
PARTS = (COMPUTE, PADDING, COMMUNICATION, WAITING, DATA, HOST, CHECKPOINT)
"""In the order in which they are shown."""

STEP, UPDATE = PREFIX + "step", PREFIX + "update"
_OF_SPANS = {
    PREFIX + "data": DATA,
    PREFIX + "checkpoint": CHECKPOINT,
    PREFIX + "log": HOST,
    PREFIX + "compute": COMPUTE,
}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_COLLECTIVES = ("c10d::", "_c10d_functional::", "gloo:", "nccl:")
_GAP = "gap"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Event:
    """One event of a trace, in seconds; `category` is the trace's own (cpu_op, user_annotation, kernel …)."""

    name: str
    category: str
    thread: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """A time of the main thread that is one part's; `cell` counts the spans that began or ended before it."""

    start: float
    end: float
    part: str
    step: int
    cell: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


@dataclass
class RankTimes:
    """Where the time of one rank's steps went.

    Attributes:
        wall: seconds of all steps.
        parts: seconds by part, without padding and waiting, which take the whole of the others to be known.
        trained: those of `compute` that are of forward and backward, in which padding is computed too.
        exposed: of `communication`, by step and by cell in it: the ranks' cells correspond.
        hidden: seconds of communication behind other parts.
        padding: share of the tokens computed that were none.
    """

    wall: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    trained: float = 0.0
    exposed: list[list[float]] = field(default_factory=list)
    hidden: float = 0.0
    padding: float = 0.0


def is_collective(event: Event) -> bool:
    """Whether this is communication itself, not code that leads to it."""
    if event.category in _ON_DEVICE:
        return "nccl" in event.name.lower()
    return event.name.startswith(_COLLECTIVES)


def is_operator(event: Event) -> bool:
    """Whether this computes: an operator, as `aten::mm`, and not a node of autograd around one."""
    return event.category == "cpu_op" and "::" in event.name and not event.name.startswith("autograd::")


def rank_times(events: Sequence[Event], padding: float = 0.0) -> RankTimes:
    """The parts of the steps in a trace; `padding` is the share of the tokens computed that were none."""
    steps = sorted(
        (event for event in events if event.name == STEP and event.category == "user_annotation"), key=_order
    )
    if not steps:
        return RankTimes()
    device = [event for event in events if event.category in _ON_DEVICE]
    main = [e for e in events if e.thread == steps[0].thread and e.category in ("cpu_op", "user_annotation")]
    segments = list(_segments(sorted(main, key=_order), launches_only=bool(device)))
    collectives = [e for e in events if is_collective(e) and (e.thread != steps[0].thread or e.category in _ON_DEVICE)]
    in_flight = union((e.start, e.end) for e in collectives)
    if device:
        segments = list(_covered(segments, union((e.start, e.end) for e in device if is_collective(e)), COMMUNICATION))
        segments = list(_covered(segments, union((e.start, e.end) for e in device if not is_collective(e)), COMPUTE))
    segments = list(_covered(segments, in_flight, COMMUNICATION, only=_GAP))
    segments = [replace(s, part=HOST) if s.part == _GAP else s for s in segments]
    where = "gpu_user_annotation" if device else "user_annotation"
    updates = union((e.start, e.end) for e in events if e.name == UPDATE and e.category == where)
    return RankTimes(
        wall=sum(step.end - step.start for step in steps),
        parts={part: sum(s.seconds for s in segments if s.part == part) for part in PARTS},
        trained=sum(s.seconds for s, inside in cut(segments, updates) if not inside and s.part == COMPUTE),
        exposed=_cells(segments, len(steps)),
        hidden=sum(s.seconds for s, inside in cut(segments, in_flight) if inside and s.part != COMMUNICATION),
        padding=padding,
    )


def all_ranks(ranks: Sequence[RankTimes]) -> list[dict[str, float]]:
    """The seconds of each rank by part, padding and waiting among them; each adds up to its wall time."""
    waiting = _waiting([rank.exposed for rank in ranks])
    found = []
    for rank, waited in zip(ranks, waiting, strict=True):
        padded = rank.trained * rank.padding
        parts = dict.fromkeys(PARTS, 0.0) | rank.parts
        found.append(
            parts
            | {PADDING: padded, COMPUTE: parts[COMPUTE] - padded}
            | {WAITING: waited, COMMUNICATION: parts[COMMUNICATION] - waited}
        )
    return found


def _waiting(exposed: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Of each rank: in each cell, the rank that came last waited least, and what is more for another was for it."""
    shapes = {tuple(map(len, steps)) for steps in exposed}
    if len(shapes) > 1:  # as where one rank had more to log: then by whole steps
        fewest = min(map(len, exposed))
        exposed = [[[sum(cells)] for cells in steps[:fewest]] for steps in exposed]
    flat = [[seconds for cells in steps for seconds in cells] for steps in exposed]
    least = [min(column) for column in zip(*flat, strict=True)]
    return [math.fsum(own) - math.fsum(least) for own in flat]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in disjoint intervals, ascending."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def cut(segments: Sequence[Segment], cover: Sequence[Interval]) -> Iterator[tuple[Segment, bool]]:
    """The segments in pieces, each with whether it lies in `cover`; both ascend and are disjoint."""
    first = 0
    for segment in segments:
        at = segment.start
        while first < len(cover) and cover[first][1] <= at:
            first += 1
        for start, end in cover[first:]:
            if start >= segment.end:
                break
            if start > at:
                yield replace(segment, start=at, end=start), False
            yield replace(segment, start=max(at, start), end=min(end, segment.end)), True
            at = min(end, segment.end)
        if at < segment.end:
            yield replace(segment, start=at), False


def _covered(
    segments: Sequence[Segment], cover: Sequence[Interval], part: str, only: str | None = None
) -> Iterator[Segment]:
    for segment, inside in cut(segments, cover):
        yield replace(segment, part=part) if inside and only in (None, segment.part) else segment


def _segments(main: Sequence[Event], *, launches_only: bool) -> Iterator[Segment]:
    """What the main thread did within steps; operators are but launches where the computing is a GPU's."""
    step, spans = -1, 0
    seen: Event | None = None
    for start, end, stack in _innermost(main):
        if not stack or not any(event.name == STEP for event in stack):
            continue
        root = next(event for event in stack if event.name == STEP)
        if root is not seen:
            seen, step, spans = root, step + 1, 0
            names: tuple[int, ...] = ()
        now = tuple(id(event) for event in stack if event.name.startswith(PREFIX))
        if now != names:
            names, spans = now, spans + 1
        part = _part(stack)
        yield Segment(start, end, HOST if launches_only and part == COMPUTE else part, step, spans)


def _part(stack: Sequence[Event]) -> str:
    for event in stack:
        if event.name in _OF_SPANS:
            return _OF_SPANS[event.name]
    if is_collective(stack[-1]):
        return COMMUNICATION
    return COMPUTE if is_operator(stack[-1]) else _GAP


def _innermost(events: Sequence[Event]) -> Iterator[tuple[float, float, tuple[Event, ...]]]:
    """The time of one thread in pieces, with the events that were open in each, the innermost last."""
    stack: list[Event] = []
    at = -math.inf
    for event in (*events, None):
        start = event.start if event else math.inf
        while stack and stack[-1].end <= start:
            if stack[-1].end > at:
                yield at, stack[-1].end, tuple(stack)
                at = stack[-1].end
            stack.pop()
        if event:
            if stack and start > at:
                yield at, start, tuple(stack)
            at = max(at, start)
            stack.append(event)


def _cells(segments: Iterable[Segment], steps: int) -> list[list[float]]:
    """Exposed communication by step and cell; a cell without any is there, too."""
    found: list[list[float]] = [[] for _ in range(steps)]
    for segment in segments:
        cells = found[segment.step]
        cells += [0.0] * (segment.cell + 1 - len(cells))
        cells[segment.cell] += segment.seconds if segment.part == COMMUNICATION else 0.0
    return found


def _order(event: Event) -> tuple[float, float]:
    return event.start, -event.end
