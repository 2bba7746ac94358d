"""How the texts of a micro-batch lie in memory: as a row of tokens, and in groups for attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

ROW = 32
"""The row's length is a multiple of it: libraries of matrix products prepare for each shape that they have not met."""
LENGTH = 16
"""A group's longest text counts as a multiple of it, for the same reason."""
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
        tokens: how many there are.
        groups: neighbours in the row.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.shape = mask.shape
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        found = mask[order].flatten().nonzero().squeeze(1)
        # Where each token of the row lies in the flattened batch.
        self._places = order[found // mask.shape[1]] * mask.shape[1] + found % mask.shape[1]
        self.tokens = len(found)
        filler = -self.tokens % ROW
        self._places_filled = torch.cat([self._places, self._places[:1].expand(filler)])
        self.groups = _groups([length for length in lengths[order].tolist() if length], mask.device)
        held = torch.cat([group.held.flatten() for group in self.groups])
        self._slots = held.nonzero().squeeze(1)
        # Where each slot finds its token in the row; those that hold none show the one before.
        self._sources = (held.cumsum(0) - 1).clamp(min=0)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(texts or 1, length, …) to (1, row, …)."""
        whole = padded.expand(self.shape[0], *padded.shape[1:])
        return whole.flatten(0, 1).index_select(0, self._places_filled).unsqueeze(0)

    def unpack(self, row: torch.Tensor) -> torch.Tensor:
        """(1, row, …) to (texts, length, …), with zeros for padding."""
        flat = row.new_zeros(self.shape.numel(), *row.shape[2:])
        return flat.index_copy(0, self._places, row[0, : self.tokens]).view(*self.shape, *row.shape[2:])

    def spread(self, row: torch.Tensor) -> torch.Tensor:
        """(row, …) to (slots, …), in which each text of a group takes as much room as its longest one.

        What stands in the room that is left must not count, and gets no gradient.
        """
        return _Spread.apply(row, self)  # type: ignore[no-any-return,no-untyped-call]

    def join(self, slots: torch.Tensor) -> torch.Tensor:
        """(slots, …) to (row, …), with zeros as filler: the way back from `spread`."""
        return _Join.apply(slots, self)  # type: ignore[no-any-return,no-untyped-call]

    def _tokens_to_slots(self, row: torch.Tensor) -> torch.Tensor:
        slots = row.new_zeros(len(self._sources), *row.shape[1:])
        return slots.index_copy_(0, self._slots, row[: self.tokens])

    def _slots_to_tokens(self, slots: torch.Tensor) -> torch.Tensor:
        row = slots.new_empty(len(self._places_filled), *slots.shape[1:])
        torch.index_select(slots, 0, self._slots, out=row[: self.tokens])
        row[self.tokens :] = 0
        return row


class _Spread(torch.autograd.Function):
    """Faster than the gradient of `index_select`, which adds up what comes from slots that count for nothing."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, texts: Texts) -> torch.Tensor:
        ctx.texts = texts
        return row.index_select(0, texts._sources)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.texts._slots_to_tokens(gradient), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: torch.Tensor, texts: Texts) -> torch.Tensor:
        ctx.texts = texts
        return texts._slots_to_tokens(slots)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.texts._tokens_to_slots(gradient), None


class Group:
    """Texts of similar length.

    Args:
        lengths: of the texts, ascending.
        longest: room for each of them.

    Attributes:
        texts: how many.
        slots: of all of them.
        held: (texts, longest), true where there is a token.
    """

    def __init__(self, lengths: Sequence[int], longest: int, device: torch.device) -> None:
        self.texts, self.longest = len(lengths), longest
        self.slots = self.texts * longest
        self.held = torch.tensor(lengths, device=device)[:, None] > torch.arange(longest, device=device)
        self._full = lengths[0] == longest
        self._biases: dict[tuple[bool, int | None, torch.dtype], torch.Tensor | None] = {}

    def bias(self, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """(texts or 1, 1, longest or 1, longest) to be added to the products; None where all tokens attend to all.

        Args:
            causal: a token attends to none behind it.
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
            masks.append(self.held[:, None, None, :])
        places = torch.arange(self.longest, device=self.held.device)
        behind = places[:, None] - places
        if causal:
            masks.append((behind >= 0)[None, None])
        if window is not None and window < self.longest:
            masks.append((behind.abs() < window)[None, None])
        if not masks:
            return None
        seen = functools.reduce(torch.logical_and, masks)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _groups(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """Groups of texts whose lengths ascend, each begun with the longest that is left."""
    found: list[Group] = []
    end = len(lengths)
    while end:
        longest = -(-lengths[end - 1] // LENGTH) * LENGTH
        most = max(1, PAIRS // longest**2)
        first = end - 1
        while first and end - first < most and lengths[first - 1] >= NEAR * longest:
            first -= 1
        found.append(Group(lengths[first:end], longest, device))
        end = first
    return found[::-1]
