"""A tag for each word; what counts is the names that the tags mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.data.entities import OUTSIDE, entities
from toolkit.data.token_tags import IGNORED
from toolkit.tasks.base import Batch, Task, problem_of_tokens, whole_numbers


class TokenClassification(Task):
    """Cross-entropy over the tags of words; precision, recall and F1 of whole names, as conlleval and seqeval count.

    A name is found where its tags say so from its first word to its last, and of the right type. Only counts are kept:
    of each type, how many names there are, were said to be, and were found.

    Args:
        labels: the tags, by index: `O`, and B and I of each type.
        tokenizer: pads the samples of a micro-batch to its longest.
        label_smoothing: share of the target spread over all tags, in training only.
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens of the longest sample that the model takes; None for any number.
    """

    unit = "words"
    smooths_labels = True

    def __init__(
        self,
        labels: Sequence[str],
        tokenizer: Any,
        label_smoothing: float = 0.0,
        *,
        vocabulary: int,
        positions: int | None = None,
    ) -> None:
        self.labels = tuple(labels)
        self.kinds = tuple(dict.fromkeys(label[2:] for label in labels if label != OUTSIDE))
        self.tokenizer = tokenizer
        self.label_smoothing = label_smoothing
        self.vocabulary = vocabulary
        self.positions = positions

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """Pad on the tokenizer's side: `input_ids`, `attention_mask` and labels, each (B, L)."""
        inputs = self.tokenizer.pad({"input_ids": list(rows["input_ids"])}, return_tensors="pt")
        labels = torch.full(inputs["input_ids"].shape, IGNORED)
        if not empty:
            marks = torch.tensor([mark for row in rows["labels"] for mark in row])
            labels.masked_scatter_(inputs["attention_mask"].bool(), marks)
        size = len(rows["id"])
        return Batch(
            inputs={name: inputs[name] for name in ("input_ids", "attention_mask")},
            labels=labels,
            weights=torch.zeros(size) if empty else torch.ones(size),
            ids=[] if empty else list(rows["id"]),
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens, too many, one without an embedding, or labels that are none or not as many."""
        if why := problem_of_tokens(row["input_ids"], self.vocabulary, self.positions):
            return why
        marks = whole_numbers(row["labels"])
        if marks is None or len(marks) != len(row["input_ids"]):
            return "its labels are not as many whole numbers as it has tokens"
        strange = marks[(marks != IGNORED) & ((marks < 0) | (marks >= len(self.labels)))]
        return f"label {strange[0]} is not among the {len(self.labels)} tags" if len(strange) else ""

    def title(self, batch: Batch, row: int) -> str:
        """The tags of its words."""
        return f"tags: {' '.join(self.labels[mark] for mark in batch.labels[row].tolist() if mark != IGNORED)}"

    def units(self, batch: Batch) -> int:
        """Words that have a label."""
        return int((batch.labels != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Smoothed cross-entropy, summed over the words."""
        return self._cross_entropy(outputs, batch, self.label_smoothing)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Names of each type (type; found, true, said), plain cross-entropy and number of words."""
        predicted, true = outputs.logits.argmax(-1).tolist(), batch.labels.tolist()
        counts = torch.zeros(len(self.kinds), 3, dtype=torch.float64)
        for said_row, true_row in zip(predicted, true, strict=True):
            words = [at for at, mark in enumerate(true_row) if mark != IGNORED]
            said, there = (set(entities(self.labels[row[at]] for at in words)) for row in (said_row, true_row))
            for column, found in enumerate((said & there, there, said)):
                for _, _, kind in found:
                    counts[self.kinds.index(kind), column] += 1
        return {
            "names": counts.to(batch.labels.device),
            "loss": self._cross_entropy(outputs, batch, 0.0).double(),
            "units": (batch.labels != IGNORED).sum().double(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Precision, recall and F1 of the names of all types together, a row for each type, and the loss."""
        names = counts["names"].cpu().numpy().astype(np.int64)
        (precision, recall, f1), each = _scores(*names.sum(0).tolist()), [_scores(*row) for row in names.tolist()]
        units = float(counts["units"])
        return {
            "entity_f1": f1,
            "entity_precision": precision,
            "entity_recall": recall,
            "loss": float(counts["loss"]) / units,
            "units": int(units),
            "per_class": [
                {"label": kind, "precision": p, "recall": r, "f1": f, "support": int(row[1])}
                for kind, (p, r, f), row in zip(self.kinds, each, names, strict=True)
            ],
        }

    @staticmethod
    def _cross_entropy(outputs: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        logits = outputs.logits.float().flatten(0, 1)
        return F.cross_entropy(
            logits, batch.labels.flatten(), reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
        )


def _scores(found: int, there: int, said: int) -> tuple[float, float, float]:
    """Precision, recall and F1; 0 of nothing."""
    return found / max(said, 1), found / max(there, 1), 2 * found / max(said + there, 1)
