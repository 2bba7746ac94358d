"""Texts of any lengths in sequences of one: cut where they are longer, and packed so that little room is left."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Parts of texts that lie end to end.

    Attributes:
        text: number of the text that each is from.
        start: of each among the tokens of all texts.
        length: of each.
    """

    text: Numbers
    start: Numbers
    length: Numbers


def cut(lengths: Numbers, room: int) -> Pieces:
    """Texts as pieces of at most `room` tokens; each piece begins with the token that the one before ends with.

    So that, where a token is to be predicted from those before it, each is predicted once, but for a text's first.

    Args:
        lengths: tokens of each text; those with fewer than two have nothing to predict, and give no piece.
        room: at least 2.
    """
    parts = np.maximum(0, -(-(lengths - 1) // (room - 1)))
    text = np.repeat(np.arange(len(lengths)), parts)
    number = np.arange(len(text)) - np.repeat(np.cumsum(parts) - parts, parts)
    skipped = number * (room - 1)
    starts = np.cumsum(lengths) - lengths
    return Pieces(text, starts[text] + skipped, np.minimum(room, lengths[text] - skipped))


def pack(lengths: Numbers, room: int) -> list[list[int]]:
    """Numbers of pieces, those of each sequence together: best-fit decreasing (Ding et al. 2024, section 3.2).

    The longest piece that is left goes to the fullest sequence that it fits into. Sequences stand in the order of
    their first pieces.

    Args:
        lengths: of the pieces, each at most `room`.
        room: of a sequence.
    """
    open_by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # those for which there is a sequence, sorted
    sequences: list[list[int]] = []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            left, sequence = room, list[int]()
            sequences.append(sequence)
        else:
            left = rooms[at]
            sequence = open_by_room[left].pop()
            if not open_by_room[left]:
                del rooms[at], open_by_room[left]
        sequence.append(piece)
        if left := left - length:
            if left not in open_by_room:
                bisect.insort(rooms, left)
            open_by_room.setdefault(left, []).append(sequence)
    return sorted(map(sorted, sequences))
