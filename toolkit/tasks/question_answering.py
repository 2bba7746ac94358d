"""Where in a passage the answer to a question begins and ends."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.data.contents import DENSE
from toolkit.tasks.base import Batch, Task, problem_of_tokens

_OF_PASSAGE, _FIRST, _LAST = 1, 2, 4
"""Bits of a token's label."""
_WORD = re.compile(rf"[{DENSE}]|[^\s{DENSE}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass
class SpanBatch(Batch):
    """Windows of one micro-batch, those of each question together.

    Attributes:
        windows: of each question.
        offsets: of each window, where each of its tokens begins and ends in the passage.
        passages: of each question.
        answers: of each question, all that are right.
    """

    windows: list[int] = field(default_factory=list)
    offsets: list[tuple[Sequence[int], Sequence[int]]] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)


class QuestionAnswering(Task):
    """Cross-entropy of the first and of the last token of the answer, each over the passage's tokens and the first
    token of all, which stands for an answer that is not in this window.

    The answer that is given is the likeliest stretch of all windows. It is compared as text with those that are right:
    exact match and F1 of the words, as SQuAD's script has them (Rajpurkar et al. 2016), characters for words in
    scripts without blanks.

    Args:
        tokenizer: its padding token fills windows up.
        longest: tokens of the longest answer that is given.
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens of the longest window that the model takes; None for any number.
    """

    unit = "windows"

    def __init__(self, tokenizer: Any, *, longest: int, vocabulary: int, positions: int | None = None) -> None:
        self.padding = tokenizer.pad_token_id
        self.segmented = "token_type_ids" in tokenizer.model_input_names
        self.longest = longest
        self.vocabulary = vocabulary
        self.positions = positions

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> SpanBatch:
        """Windows padded on the right: `input_ids`, `attention_mask`, `token_type_ids` if the model reads them, and
        labels, each (windows, L)."""
        lengths = torch.tensor([length for pieces in rows["pieces"] for length in pieces])
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        inputs = {"input_ids": _padded(rows["input_ids"], there, self.padding), "attention_mask": there.long()}
        if self.segmented:
            inputs["token_type_ids"] = _padded(rows["segments"], there, 0)
        begins = _padded(rows["begins"], there, -1)
        ends = _padded(rows["ends"], there, -1)
        labels = (begins >= 0).long() * _OF_PASSAGE
        numbers = torch.arange(len(lengths))
        for key, bit in (("first", _FIRST), ("last", _LAST)):
            labels[numbers, torch.tensor([place for places in rows[key] for place in places])] += bit
        return SpanBatch(
            inputs=inputs,
            labels=labels,
            weights=torch.zeros(len(lengths)) if empty else torch.ones(len(lengths)),
            ids=[] if empty else list(rows["id"]),
            windows=[] if empty else [len(pieces) for pieces in rows["pieces"]],
            offsets=list(zip(begins.tolist(), ends.tolist(), strict=True)),
            passages=list(rows["passage"]),
            answers=[list(answers) for answers in rows["answers"]],
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens, one without an embedding, or windows that are too long or do not add up."""
        if why := problem_of_tokens(row["input_ids"], self.vocabulary, None):
            return why
        if sum(row["pieces"]) != len(row["input_ids"]) or min(row["pieces"]) < 1:
            return "its windows do not add up to its tokens"
        if self.positions is not None and max(row["pieces"]) > self.positions:
            return f"a window has {max(row['pieces'])} tokens, of which the model takes {self.positions}"
        return ""

    def learnt(self, batch: Batch) -> torch.Tensor:
        """The answer, in windows that have it."""
        first, last = _place(batch.labels, _FIRST), _place(batch.labels, _LAST)
        at = torch.arange(batch.labels.shape[1])
        return (at >= first[:, None]) & (at <= last[:, None]) & (first > 0)[:, None]

    def units(self, batch: Batch) -> int:
        """Windows that count."""
        return sum(batch.windows) if isinstance(batch, SpanBatch) else 0

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of the two cross-entropies, summed over the windows."""
        allowed = (batch.labels & _OF_PASSAGE).bool()
        allowed[:, 0] = True
        total = torch.zeros((), device=batch.labels.device)
        for logits, bit in ((outputs.start_logits, _FIRST), (outputs.end_logits, _LAST)):
            scores = logits.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
            total = total + F.cross_entropy(scores, _place(batch.labels, bit), reduction="none") @ batch.weights
        return total / 2

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Exact matches, F1 and number of questions, cross-entropy and number of windows."""
        assert isinstance(batch, SpanBatch)
        figures = np.zeros(3)
        for number, said in enumerate(self._answers(outputs, batch)):
            right = batch.answers[number]
            figures += (max(exact_match(said, one) for one in right), max(token_f1(said, one) for one in right), 1)
        counts = torch.tensor(figures, dtype=torch.float64, device=batch.labels.device)
        return {
            "answers": counts,
            "loss": self.loss(outputs, batch).double(),
            "units": batch.weights.double().sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Exact match and F1 of the words, in the mean over the questions, and the loss over the windows."""
        exact, f1, questions = counts["answers"].tolist()
        units = float(counts["units"])
        return {
            "exact_match": exact / max(questions, 1),
            "token_f1": f1 / max(questions, 1),
            "questions": int(questions),
            "loss": float(counts["loss"]) / units,
            "units": int(units),
        }

    def _answers(self, outputs: Any, batch: SpanBatch) -> Iterator[str]:
        allowed = (batch.labels & _OF_PASSAGE).bool()
        scores, first, last = best_spans(outputs.start_logits, outputs.end_logits, allowed, self.longest)
        begin = 0
        for count, passage in zip(batch.windows, batch.passages, strict=False):  # none of filler
            window = begin + max(range(count), key=scores[begin : begin + count].__getitem__)
            begins, ends = batch.offsets[window]
            yield passage[begins[first[window]] : ends[last[window]]]
            begin += count


def best_spans(
    start: torch.Tensor, end: torch.Tensor, allowed: torch.Tensor, longest: int
) -> tuple[list[float], list[int], list[int]]:
    """Of each window the stretch of allowed tokens with the highest sum of both logits: that, its first and last token.

    Args:
        start, end: logits (windows, L).
        allowed: (windows, L) bool.
        longest: tokens of a stretch, at most.
    """
    least = torch.finfo(torch.float32).min / 4
    start, end = (logits.float().masked_fill(~allowed, least) for logits in (start, end))
    size = start.shape[1]
    band = torch.ones(size, size, dtype=torch.bool, device=start.device).triu().tril(longest - 1)
    scores = (start[:, :, None] + end[:, None, :]).masked_fill(~band, 2 * least).flatten(1)
    best, at = scores.max(-1)
    return best.tolist(), (at // size).tolist(), (at % size).tolist()


def exact_match(said: str, right: str) -> float:
    """1 where both are the same but for case, punctuation, articles and white space; else 0."""
    return float(_words(said) == _words(right))


def token_f1(said: str, right: str) -> float:
    """Harmonic mean of the shares of the words of each that are in the other too, as often."""
    one, other = _words(said), _words(right)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other)) if shared else float(one == other)


def _words(text: str) -> list[str]:
    kept = (c for c in unicodedata.normalize("NFKC", text).lower() if not _is_punctuation(c))
    return _WORD.findall(_ARTICLES.sub(" ", "".join(kept)))


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _place(labels: torch.Tensor, bit: int) -> torch.Tensor:
    """The token of each window that has the bit."""
    return (labels & bit).argmax(-1)


def _padded(rows: Sequence[Sequence[int]], there: torch.Tensor, filler: int) -> torch.Tensor:
    flat = torch.from_numpy(np.concatenate([np.asarray(row, np.int64) for row in rows]))
    return torch.full(there.shape, filler).masked_scatter_(there, flat)
