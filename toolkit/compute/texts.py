"""How the texts of a micro-batch lie in memory: as a row of tokens, and in groups for attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.compute.host import on_device, pinned

Way = Callable[[torch.Tensor], torch.Tensor]

ROW = 32
"""The row's length is a multiple of it, and of more where it is long (`few_sizes`): on a CPU oneDNN prepares for each
shape that it has not met, and keeps what it prepared: 1.4 MB for a product with 576 × 1,536 weights, of which a layer
has three, until there are 1,024 of them."""
LENGTH = 16
"""Room for a text counts as a multiple of it, for the same reason."""
PAIRS = 2**16
"""Pairs of tokens whose attention is computed at once: the weights of some ten heads then stay in a core's cache."""
NEAR = 0.6
"""The shortest text of a group, as a share of the longest at least."""


class Texts:
    """The texts of one micro-batch end to end; at the end of the row a few tokens of filler.

    Everything is laid out on the host: an accelerator is given the places, and nothing is asked of it.

    Args:
        mask: (texts, length) on the CPU, true where there is a token.
        device: where the rows lie.
        multiple: of which the row's length is one; by default as few lengths as pay.

    Attributes:
        shape: of the mask.
        device: where the rows lie.
        tokens: how many there are.
        row: how many with the filler.
        lengths, starts: (texts,) on the CPU, of each text and of its place in the row.
        rooms: slots for each text, where it is the longest of a group.
        bounds: (texts + 2,) int32, where in the row each text begins, the filler begins and the row ends.
        longest: no text, nor the filler, is longer.
    """

    def __init__(self, mask: torch.Tensor, device: torch.device, multiple: int | None = None) -> None:
        self.shape, self.device = mask.shape, device
        tokens = int(mask.sum())
        if multiple is None:
            multiple = max(ROW, few_sizes(tokens)[1]) if device.type == "cpu" else ROW
        self.row = max(1, -(-tokens // multiple)) * multiple
        self.longest = max(mask.shape[1], multiple)
        laid = self._lay(mask)
        self._places, self._columns, self._inverse, self._padding, self._filler, self.bounds = (
            on_device(tensor, device) for tensor in laid
        )

    def refill(self, mask: torch.Tensor) -> None:
        """Lay others, padded to the same shape and with a row no longer, in the place of these texts."""
        here = self._places, self._columns, self._inverse, self._padding, self._filler, self.bounds
        for there, tensor in zip(here, self._lay(mask), strict=True):
            there.copy_(pinned(tensor), non_blocking=True)

    def _lay(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.tokens = int(mask.sum())
        assert mask.shape == self.shape
        assert self.tokens <= self.row, "more tokens than there is room for"
        held = mask.flatten()
        found = held.nonzero().squeeze(1)
        # Filler shows the first token, and padding too; both are blotted out where they would count.
        places = torch.zeros(self.row, dtype=torch.long)
        places[: self.tokens] = found
        inverse = torch.zeros(held.shape, dtype=torch.long)
        inverse[found] = torch.arange(self.tokens)
        self.lengths = mask.sum(1)
        self.rooms = _rooms(self.lengths.tolist())
        ends = self.lengths.cumsum(0)
        self.starts = ends - self.lengths
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([self.row])]).int()
        return places, places % self.shape[1], inverse, ~held, torch.arange(self.row) >= self.tokens, bounds

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(texts or 1, length, …) to (1, row, …)."""
        if padded.shape[0] != self.shape[0]:  # what is alike for all texts
            return padded[0].index_select(0, self._columns).unsqueeze(0)
        return _Choice.apply(padded.flatten(0, 1), self.to_row, self.from_row).unsqueeze(0)  # type: ignore[no-any-return,no-untyped-call]

    def unpack(self, row: torch.Tensor) -> torch.Tensor:
        """(1, row, …) to (texts, length, …), with zeros for padding."""
        return _Choice.apply(row[0], self.from_row, self.back_to_row).view(*self.shape, *row.shape[2:])  # type: ignore[no-any-return,no-untyped-call]

    def to_row(self, padded: torch.Tensor) -> torch.Tensor:
        """As `pack` goes: (texts × length, …) to (row, …); filler shows a token."""
        return padded.index_select(0, self._places)

    def from_row(self, row: torch.Tensor) -> torch.Tensor:
        """As `unpack` goes, with zeros for padding."""
        return _blotted(row.index_select(0, self._inverse), self._padding)

    def back_to_row(self, gradient: torch.Tensor) -> torch.Tensor:
        """As the gradient of `unpack` goes: (texts × length, …) to (row, …), with zeros as filler."""
        return _blotted(self.to_row(gradient), self._filler)


def few_sizes(count: int) -> tuple[int, int]:
    """`count` up to a multiple of a sixteenth of its magnitude, which is 3 % more in the mean; and that multiple."""
    multiple = max(1, (1 << (count.bit_length() - 1)) // 16) if count else 1
    return -(-count // multiple) * multiple, multiple


def _blotted(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return values.masked_fill_(where.view(-1, *(1,) * (values.ndim - 1)), 0)


class _Choice(torch.autograd.Function):
    """Tokens put elsewhere, and the way back for their gradients. Both are choices: no sums, which would depend on an
    order, and shapes that are known beforehand."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, there: Way, back: Way) -> torch.Tensor:
        ctx.back = back
        return there(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.back(gradient), None, None


class Pairs:
    """Which texts attend to which: each to itself, or each of a decoder to that of the encoder with the same number.

    Args:
        of_queries: the texts whose tokens attend.
        of_keys: what they attend to; the same object where each text attends to itself.

    """

    def __init__(self, of_queries: Texts, of_keys: Texts) -> None:
        self.of_queries, self.of_keys = of_queries, of_keys

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Of pairs of similar lengths."""
        return [Group(numbers, self.of_queries, self.of_keys) for numbers in _grouped(self.of_queries, self.of_keys)]

    @functools.cached_property
    def queries(self) -> Slots:
        """The room that the tokens of queries have in the groups."""
        return Slots(self.of_queries, [(group.numbers, group.rows) for group in self.groups])

    @functools.cached_property
    def keys(self) -> Slots:
        """And those of keys."""
        if self.of_keys is self.of_queries:
            return self.queries
        return Slots(self.of_keys, [(group.numbers, group.columns) for group in self.groups])

    @functools.cached_property
    def longest(self) -> int:
        """Room of the longest text."""
        return max(max(group.rows, group.columns) for group in self.groups)


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
        self._shown, self._slots = on_device(shown, texts.device), on_device(slots, texts.device)

    def spread(self, row: torch.Tensor) -> torch.Tensor:
        """(row, …) to (slots, …). What stands in the room that is left must not count, and gets no gradient.

        The gradient of `index_select` would add up what comes from there.
        """
        return _Choice.apply(row, self.shown, self.to_tokens)  # type: ignore[no-any-return,no-untyped-call]

    def join(self, slots: torch.Tensor) -> torch.Tensor:
        """(slots, …) to (row, …), with zeros as filler: the way back from `spread`."""
        return _Choice.apply(slots, self.to_tokens, self.from_tokens)  # type: ignore[no-any-return,no-untyped-call]

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
        self._held = on_device(lengths[:, None] > torch.arange(self.columns), keys.device)
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
