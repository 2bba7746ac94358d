"""How the texts of a micro-batch lie in memory: as a row of tokens, and in groups for attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

ROW = 32
"""The row's length is a multiple of it: libraries of matrix products prepare for each shape that they have not met."""
LENGTH = 16
"""Room for a text counts as a multiple of it, for the same reason."""
PAIRS = 2**16
"""Pairs of tokens whose attention is computed at once: the weights of some ten heads then stay in a core's cache."""
NEAR = 0.6
"""The shortest text of a group, as a share of the longest at least."""


class Texts:
    """The texts of one micro-batch, sorted by length and end to end; at the end of the row a few tokens of filler.

    Args:
        mask: (texts, length), true where there is a token.

    Attributes:
        shape: of the mask.
        device: where the rows lie.
        tokens: how many there are.
        row: how many with the filler.
        lengths, starts: (texts,) on the CPU, of each text and of its place in the row.
        rooms: slots for each text, where it is the longest of a group.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.shape, self.device = mask.shape, mask.device
        mask = mask.cpu()  # to wait for an accelerator once; all that follows is arithmetic on its host
        self.lengths = mask.sum(1)
        self.rooms = _rooms(self.lengths.tolist())
        order = self.lengths.argsort(stable=True)
        sorted_lengths = self.lengths[order]
        self.starts = torch.empty_like(order)
        self.starts[order] = sorted_lengths.cumsum(0) - sorted_lengths
        found = mask[order].flatten().nonzero().squeeze(1)
        # Where each token of the row lies in the flattened batch.
        places = order[found // mask.shape[1]] * mask.shape[1] + found % mask.shape[1]
        self.tokens = len(places)
        self.row = -(-self.tokens // ROW) * ROW
        self._places_filled = torch.cat([places, places[:1].expand(self.row - self.tokens)]).to(self.device)
        self._places = self._places_filled[: self.tokens]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(texts or 1, length, …) to (1, row, …)."""
        whole = padded.expand(self.shape[0], *padded.shape[1:])
        return whole.flatten(0, 1).index_select(0, self._places_filled).unsqueeze(0)

    def unpack(self, row: torch.Tensor) -> torch.Tensor:
        """(1, row, …) to (texts, length, …), with zeros for padding."""
        flat = row.new_zeros(self.shape.numel(), *row.shape[2:])
        return flat.index_copy(0, self._places, row[0, : self.tokens]).view(*self.shape, *row.shape[2:])


class Pairs:
    """Which texts attend to which: each to itself, or each of a decoder to that of the encoder with the same number.

    Args:
        queries: the texts whose tokens attend.
        keys: what they attend to; the same object where each text attends to itself.

    Attributes:
        groups: of pairs of similar lengths.
        queries, keys: the room that their tokens have in the groups.
        longest: room of the longest text.
    """

    def __init__(self, queries: Texts, keys: Texts) -> None:
        self.groups = [Group(numbers, queries, keys) for numbers in _grouped(queries, keys)]
        self.queries = self.keys = Slots(queries, [(group.numbers, group.rows) for group in self.groups])
        if keys is not queries:
            self.keys = Slots(keys, [(group.numbers, group.columns) for group in self.groups])
        self.longest = max(max(group.rows, group.columns) for group in self.groups)


class Slots:
    """Room for a row's texts, in which each text of a group takes as much as its longest one.

    Args:
        texts: of the row.
        groups: numbers of the texts of each, and how much room one takes.

    Attributes:
        sizes: slots of each group.
    """

    def __init__(self, texts: Texts, groups: Sequence[tuple[torch.Tensor, int]]) -> None:
        self.sizes = [len(numbers) * room for numbers, room in groups]
        self._tokens, self._row = texts.tokens, texts.row
        sources, held = [], []
        for numbers, room in groups:
            places, last = torch.arange(room), texts.lengths[numbers][:, None] - 1
            held.append((places <= last).flatten())
            sources.append((texts.starts[numbers][:, None] + torch.minimum(places, last)).flatten())
        # The token that each slot shows; those that hold none show the last one of the text.
        shown = torch.cat(sources).clamp_(0, texts.tokens - 1)
        filled = torch.cat(held).nonzero().squeeze(1)
        slots = torch.empty(texts.tokens, dtype=torch.long)
        slots[shown[filled]] = filled
        self._shown, self._slots = shown.to(texts.device), slots.to(texts.device)

    def spread(self, row: torch.Tensor) -> torch.Tensor:
        """(row, …) to (slots, …). What stands in the room that is left must not count, and gets no gradient."""
        return _Spread.apply(row, self)  # type: ignore[no-any-return,no-untyped-call]

    def join(self, slots: torch.Tensor) -> torch.Tensor:
        """(slots, …) to (row, …), with zeros as filler: the way back from `spread`."""
        return _Join.apply(slots, self)  # type: ignore[no-any-return,no-untyped-call]

    def from_tokens(self, row: torch.Tensor) -> torch.Tensor:
        """As `join` goes back: zeros in the room that is left."""
        slots = row.new_zeros(len(self._shown), *row.shape[1:])
        return slots.index_copy_(0, self._slots, row[: self._tokens])

    def to_tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """As `join` goes."""
        row = slots.new_empty(self._row, *slots.shape[1:])
        torch.index_select(slots, 0, self._slots, out=row[: self._tokens])
        row[self._tokens :] = 0
        return row

    def shown(self, row: torch.Tensor) -> torch.Tensor:
        """As `spread` goes."""
        return row.index_select(0, self._shown)


class _Spread(torch.autograd.Function):
    """Faster than the gradient of `index_select`, which adds up what comes from slots that count for nothing."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return slots.shown(row)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.slots.to_tokens(gradient), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, slots: Slots) -> torch.Tensor:
        ctx.slots = slots
        return slots.to_tokens(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.slots.from_tokens(gradient), None


class Group:
    """Pairs of texts of similar lengths.

    Args:
        numbers: of the texts.
        queries, keys: where they are from.

    Attributes:
        texts: how many pairs.
        rows, columns: room of one, for queries and for keys.
    """

    def __init__(self, numbers: Sequence[int], queries: Texts, keys: Texts) -> None:
        self.texts, self.numbers = len(numbers), torch.tensor(numbers)
        self.rows, self.columns = (max(texts.rooms[one] for one in numbers) for texts in (queries, keys))
        lengths = keys.lengths[self.numbers]
        self._full = int(lengths.min()) == self.columns
        self._held = (lengths[:, None] > torch.arange(self.columns)).to(keys.device)
        self._biases: dict[tuple[bool, int | None, torch.dtype], torch.Tensor | None] = {}

    def bias(self, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(texts or 1, 1, rows or 1, columns) to be added to the products; None where all tokens attend to all.

        Args:
            causal: a token attends to none behind it; where texts attend to themselves.
            window: to those that are less than so many away; None for any.
            dtype: of the products.
        """
        key = (causal, window, dtype)
        if key not in self._biases:  # the same in each block
            self._biases[key] = self._bias(*key)
        return self._biases[key]

    def _bias(self, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        masks = []
        if not (self._full or causal):  # what is behind a text's tokens, those of a causal model do not look at
            masks.append(self._held[:, None, None, :])
        rows, columns = (torch.arange(size, device=self._held.device) for size in (self.rows, self.columns))
        behind = rows[:, None] - columns
        if causal:
            masks.append((behind >= 0)[None, None])
        if window is not None and window < self.columns:
            masks.append((behind.abs() < window)[None, None])
        if not masks:
            return None
        seen = functools.reduce(torch.logical_and, masks)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _rooms(lengths: list[int]) -> list[int]:
    # Texts of one length (images are) take no more than that, in step after step.
    if min(lengths) == max(lengths) > 0:
        return lengths
    return [max(LENGTH, -(-length // LENGTH) * LENGTH) for length in lengths]


def _grouped(queries: Texts, keys: Texts) -> list[list[int]]:
    """Numbers of texts that are neighbours by length, each group begun with the longest that is left."""
    lengths = list(zip(queries.lengths.tolist(), keys.lengths.tolist(), strict=True))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[list[int]] = []
    end = len(order)
    while end:
        first = end - 1
        rows, columns = queries.rooms[order[first]], keys.rooms[order[first]]
        while first and lengths[order[first - 1]][0] >= NEAR * rows:
            wider = max(columns, keys.rooms[order[first - 1]])
            if (end - first + 1) * rows * wider > PAIRS:
                break
            first, columns = first - 1, wider
        found.append(order[first:end])
        end = first
    return found[::-1]
