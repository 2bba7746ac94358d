"""A text to be written for each text: by an encoder–decoder, or by a decoder that goes on with what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.compute.cross_entropy import IGNORED
from toolkit.tasks.base import Batch, Task, problem_of_tokens


@dataclass
class PairBatch(Batch):
    """Pairs of texts of one micro-batch.

    Attributes:
        sources: as they were given.
        targets: likewise.
        prompts: what the model is given to write from, as keyword arguments of `generate`: each (B, L).
    """

    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    prompts: dict[str, torch.Tensor] = field(default_factory=dict)


class Seq2Seq(Task):
    """Cross-entropy of the target's tokens, each given those before it (teacher forcing); perplexity.

    Args:
        tokenizer: its padding token, or where it has none its end token, fills what is not looked at.
        start: what the decoder is given before the first token of a target.
        label_smoothing: share of a target spread over the vocabulary, in training only (Szegedy et al. 2016).
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens of the longest source, and of the longest target, that the model takes; None for any number.
        fused: the model gives the summed loss instead of logits where it is given labels (`fuse_loss`).
    """

    unit = "tokens"
    smooths_labels = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        start: int = 0,
        label_smoothing: float = 0.0,
        vocabulary: int,
        positions: int | None = None,
        fused: bool = False,
    ) -> None:
        assert not (fused and label_smoothing), "the fused loss smooths no labels"
        self.padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.start = start
        self.label_smoothing = label_smoothing
        self.vocabulary = vocabulary
        self.positions = positions
        self.fused = fused

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> PairBatch:
        """Both sides padded on the right; the decoder is given the target, moved by one behind the start token.

        `input_ids`, `attention_mask` (B, L); `decoder_input_ids`, `decoder_attention_mask`, labels (B, T). Padding is
        no label, and neither is what stands in a filler.
        """
        given, there = padded(rows["input_ids"], self.padding)
        written, learnt = padded(rows["labels"], self.padding)
        shifted = torch.cat([torch.full((len(written), 1), self.start), written[:, :-1]], dim=1)
        prompts = {"input_ids": given, "attention_mask": there.long()}
        inputs = prompts | {"decoder_input_ids": shifted, "decoder_attention_mask": learnt.long()}
        return self._batch(rows, empty, inputs, written.masked_fill(~learnt, IGNORED), prompts)

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens on a side, too many, or one without an embedding."""
        for side, name in (("input_ids", "source"), ("labels", "target")):
            if why := problem_of_tokens(row[side], self.vocabulary, self.positions):
                return f"of its {name}, {why}"
        return ""

    def shown(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The source, and behind it the target, which is learnt."""
        learnt = batch.labels != IGNORED
        ids, there = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        targets = batch.labels.masked_fill(~learnt, self.padding)
        return (
            torch.cat([ids, targets], dim=1),
            torch.cat([there, learnt], dim=1),
            torch.cat([torch.zeros_like(there), learnt], dim=1),
        )

    def units(self, batch: Batch) -> int:
        """Tokens of targets."""
        return int((batch.labels != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Smoothed cross-entropy, summed over the tokens of targets."""
        return self._cross_entropy(outputs, batch, self.label_smoothing)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Plain cross-entropy and tokens of targets."""
        return {
            "loss": self._cross_entropy(outputs, batch, 0.0).double(),
            "units": (batch.labels != IGNORED).double().sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Loss of a token, and perplexity (its exponential)."""
        loss, units = float(counts["loss"]) / float(counts["units"]), int(counts["units"])
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "units": units}

    def _batch(
        self,
        rows: Mapping[str, Sequence[Any]],
        empty: bool,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        prompts: dict[str, torch.Tensor],
    ) -> PairBatch:
        size = len(labels)
        labels = torch.full_like(labels, IGNORED) if empty else labels
        return PairBatch(
            inputs=inputs | ({"labels": labels} if self.fused else {}),
            labels=labels,
            weights=torch.zeros(size) if empty else torch.ones(size),
            ids=[] if empty else list(rows["id"]),
            sources=list(rows["given"]),
            targets=list(rows["wanted"]),
            prompts=prompts,
        )

    def _cross_entropy(self, outputs: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        if self.fused:
            return outputs.logits.float().sum()  # type: ignore[no-any-return]
        logits = outputs.logits.flatten(0, 1).float()
        options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "sum", "label_smoothing": label_smoothing}
        return F.cross_entropy(logits, batch.labels.flatten(), **options)


class Answering(Seq2Seq):
    """The same for a decoder alone: it is given the source, and goes on with the target."""

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> PairBatch:
        """Source and target end to end, padded on the right: `input_ids`, `attention_mask`, labels (B, L + T).

        The label of a position is the token after it, where that is of the target. Prompts are padded on the left.
        """
        pairs = zip(rows["input_ids"], rows["labels"], strict=True)
        ids, there = padded([[*given, *written] for given, written in pairs], self.padding)
        starts = torch.tensor([len(given) for given in rows["input_ids"]])
        learnt = there & (torch.arange(ids.shape[1]) >= starts[:, None])
        labels = torch.full(ids.shape, IGNORED)
        labels[:, :-1] = ids[:, 1:].where(learnt[:, 1:], IGNORED)
        given, held = (side.flip(1) for side in padded([row[::-1] for row in rows["input_ids"]], self.padding))
        prompts = {"input_ids": given, "attention_mask": held.long()}
        return self._batch(rows, empty, {"input_ids": ids, "attention_mask": there.long()}, labels, prompts)

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens, too many on both sides together, or one without an embedding."""
        return problem_of_tokens([*row["input_ids"], *row["labels"]], self.vocabulary, self.positions)

    def shown(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those that are the label of the position before are learnt."""
        learnt = torch.zeros_like(batch.labels, dtype=torch.bool)
        learnt[:, 1:] = batch.labels[:, :-1] != IGNORED
        return batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), learnt


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as one tensor (B, L), padded on the right, and where there are tokens (bool)."""
    lengths = torch.tensor([len(row) for row in rows])
    there = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.tensor([token for row in rows for token in row])
    return torch.full(there.shape, filler).masked_scatter_(there, tokens), there
