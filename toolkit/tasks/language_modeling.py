"""The next token of each text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.compute.cross_entropy import IGNORED
from toolkit.tasks.base import Batch, Task, problem_of_tokens, whole_numbers


@dataclass
class TextBatch(Batch):
    """Sequences of one micro-batch, each piece of text in a row of its own.

    Attributes:
        bytes: of the texts that begin here, in UTF-8.
    """

    bytes: int = 0


class LanguageModeling(Task):
    """Cross-entropy of the next token within each text; perplexity and bits per byte.

    A sample is a sequence of packed pieces of texts. In a batch each piece is a row, so that none sees another and
    positions begin anew, and a model that computes without padding (`remove_padding`) has them end to end again. Where
    samples have a column `trained`, only the tokens that it marks are learnt.

    Args:
        tokenizer: its padding token, or where it has none its end token, fills what is not looked at.
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens of the longest piece that the model takes; None for any number.
        fused: the model gives the summed loss instead of logits where it is given labels (`fuse_loss`).
    """

    unit = "tokens"

    def __init__(self, tokenizer: Any, *, vocabulary: int, positions: int | None = None, fused: bool = False) -> None:
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocabulary = vocabulary
        self.positions = positions
        self.fused = fused

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> TextBatch:
        """Pieces padded on the right: `input_ids` and `attention_mask` (pieces, L), labels (pieces, L).

        The label of a position is the token after it, where that is to be learnt; the last of a piece has none.
        """
        lengths = torch.tensor([length for pieces in rows["pieces"] for length in pieces])
        tokens = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in rows["input_ids"]]))
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.full(there.shape, self.padding).masked_scatter_(there, tokens)
        labels = torch.full(there.shape, IGNORED)
        if not empty:
            learnt = there.clone()
            if "trained" in rows:
                trained = np.concatenate([np.asarray(marks, np.bool_) for marks in rows["trained"]])
                learnt.masked_scatter_(there, torch.from_numpy(trained))
            labels[:, :-1] = input_ids[:, 1:].where(learnt[:, 1:], IGNORED)
        inputs = {"input_ids": input_ids, "attention_mask": there.long()}
        return TextBatch(
            inputs=inputs | ({"labels": labels} if self.fused else {}),
            labels=labels,
            weights=torch.zeros(len(lengths)) if empty else torch.ones(len(lengths)),
            ids=[] if empty else list(rows["id"]),
            bytes=0 if empty else sum(rows["bytes"]),
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens, one without an embedding, pieces that are too long or do not add up, or marks that do not."""
        pieces = whole_numbers(row["pieces"])
        if pieces is None or not len(pieces) or pieces.min() < 1 or pieces.sum() != len(row["input_ids"]):
            return "its pieces do not add up to its tokens"
        if "trained" in row and len(row["trained"]) != len(row["input_ids"]):
            return "it has marks for other tokens than it has"
        if self.positions is not None and pieces.max() > self.positions:
            return f"it has a piece of {pieces.max()} tokens, of which the model takes {self.positions}"
        return problem_of_tokens(row["input_ids"], self.vocabulary, None)

    def learnt(self, batch: Batch) -> torch.Tensor:
        """Those that are the label of the position before."""
        learnt = torch.zeros_like(batch.labels, dtype=torch.bool)
        learnt[:, 1:] = batch.labels[:, :-1] != IGNORED
        return learnt

    def units(self, batch: Batch) -> int:
        """Tokens that are predicted."""
        return int((batch.labels != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy, summed over the tokens that are predicted."""
        if self.fused:
            return outputs.logits.float().sum()  # type: ignore[no-any-return]
        logits = outputs.logits.flatten(0, 1).float()
        return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropy, predicted tokens and bytes."""
        assert isinstance(batch, TextBatch)
        return {
            "loss": self.loss(outputs, batch).double(),
            "units": (batch.labels != IGNORED).double().sum(),
            "bytes": torch.tensor(float(batch.bytes), dtype=torch.float64, device=batch.labels.device),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Loss of a token, perplexity (its exponential), and bits per byte of text, which no tokenizer changes."""
        total, units, size = (float(counts[name]) for name in ("loss", "units", "bytes"))
        return {
            "loss": total / units,
            "perplexity": math.exp(min(total / units, 700.0)),
            "bits_per_byte": total / math.log(2) / size if size else math.nan,
            "units": int(units),
        }
