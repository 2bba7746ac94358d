"""What a model makes of words: its last layer over a word by itself, or over the places where it stands in texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from toolkit.embeddings.table import Table
from toolkit.embeddings.words import Piece


@dataclass(frozen=True)
class Encoder:
    """A model that gives a vector for each token.

    Attributes:
        model: of transformers, on its device, in evaluation.
        tokenizer: its own, a fast one.
        batch: texts of one forward pass.
        max_length: tokens of a text that are read.
    """

    model: Any
    tokenizer: Any
    batch: int
    max_length: int

    @property
    def unknown(self) -> int:
        """The token of what the model does not know; none of its own where there is none."""
        token: int | None = self.tokenizer.unk_token_id
        return -1 if token is None else token

    def states(self, texts: Sequence[str]) -> tuple[torch.Tensor, Any]:
        """The last layer, (texts, L, features) in fp32 on the CPU, and the encoding of the texts."""
        given = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        inputs = {name: given[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            return self.model(**inputs).last_hidden_state.float().cpu(), given


def alone(encoder: Encoder, pieces: Sequence[Piece], name: str, on_done: Callable[[int], None]) -> Table:
    """Each piece by itself: the mean of the last layer over its tokens, between the special ones."""
    wanted = sorted({piece.text for piece in pieces if piece.text}, key=lambda text: (len(text), text))
    rows: list[torch.Tensor] = []
    texts: list[str] = []
    for begin in range(0, len(wanted), encoder.batch):
        window = wanted[begin : begin + encoder.batch]
        states, given = encoder.states(window)
        inside = (given["attention_mask"] * (1 - given["special_tokens_mask"])).float()
        inside *= given["input_ids"] != encoder.unknown
        known = inside.sum(1) > 0
        means = (states * inside.unsqueeze(-1)).sum(1) / inside.sum(1, keepdim=True).clamp(min=1)
        rows.append(means[known])
        texts += [text for text, its in zip(window, known.tolist(), strict=True) if its]
        on_done(len(window))
    return Table(torch.cat(rows), [Piece(text) for text in texts], lambda piece: (), name)


def in_texts(
    encoder: Encoder,
    cut: Any,
    texts: Iterable[str],
    *,
    occurrences: int,
    name: str,
    on_done: Callable[[int], None],
) -> Table:
    """The mean of the last layer over the places where each token of a vocabulary stands in texts.

    Args:
        encoder: reads the texts.
        cut: the vocabulary's fast tokenizer, which says where its tokens stand.
        texts: any number; no more are read when every token has been met often enough.
        occurrences: places of a token that count, at most; the first ones.
        name: of the source, for people.
        on_done: told how many texts have been read.
    """
    size = max(cut.get_vocab().values()) + 1
    sums: torch.Tensor | None = None
    met = torch.zeros(size, dtype=torch.long)
    rest, read = iter(texts), 0
    while window := list(islice(rest, encoder.batch)):
        states, given = encoder.states(window)
        sums = torch.zeros(size, states.shape[-1]) if sums is None else sums
        for text, its, encoding in zip(window, states, given.encodings, strict=True):
            for token, tokens in _places(text, cut, encoding, encoder.unknown):
                if met[token] < occurrences:
                    sums[token] += its[tokens].mean(0)
                    met[token] += 1
        read += len(window)
        on_done(len(window))
    found = met.nonzero()[:, 0].tolist()
    names = cut.convert_ids_to_tokens(found)
    vectors = torch.zeros(0, 1) if sums is None else sums[found] / met[found, None]
    facts = {"texts_read": read, "places": int(met.sum())}
    return Table(vectors, [Piece(text) for text in names], lambda piece: (), name, facts)


def _places(text: str, cut: Any, encoding: Any, unknown: int) -> Iterator[tuple[int, list[int]]]:
    """Tokens of the vocabulary in a text, each with the model's tokens that lie over it."""
    given = cut(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = zip(encoding.offsets, encoding.ids, encoding.special_tokens_mask, strict=True)
    ends = [(0, 0) if mark or token == unknown else span for span, token, mark in marks]
    first = 0
    for token, (begin, end) in zip(given["input_ids"], given["offset_mapping"], strict=True):
        if begin == end or token == cut.unk_token_id:
            continue
        while first < len(ends) and ends[first][1] <= begin:
            first += 1
        over = []
        at = first
        while at < len(ends) and ends[at][0] < end:
            if ends[at][1] > begin:
                over.append(at)
            at += 1
        if over:
            yield token, over
