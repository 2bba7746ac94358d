"""One class for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from toolkit.tasks.base import Batch, Task, problem_of_tokens


class Classification(Task):
    """Cross-entropy over classes; accuracy and macro figures from a confusion matrix, so that logits are never kept.

    Args:
        labels: the classes' names, by index.
        tokenizer: pads the samples of a micro-batch to its longest.
        label_smoothing: share of the target spread over all classes, in training only (Szegedy et al. 2016).
        vocabulary: number of token ids that the model has an embedding for; by default those of the tokenizer.
        positions: tokens of the longest sample that the model takes; by default any number.
        augment: varies the tokens of a training sample, given the epoch and the sample's id.
        mixup: in the place of that, does it and mixes the sample with another one: given its label too, it gives the
            tokens and a label of real numbers, of classes the share of each.
    """

    unit = "samples"
    smooths_labels = True
    fills_up = True
    targets = torch.long
    """Type of the labels of a batch."""

    def __init__(
        self,
        labels: Sequence[str],
        tokenizer: Any,
        label_smoothing: float = 0.0,
        *,
        vocabulary: int | None = None,
        positions: int | None = None,
        augment: Callable[[Sequence[int], int, int], list[int]] | None = None,
        mixup: Callable[[Sequence[int], Any, int, int], tuple[list[int], Any]] | None = None,
    ) -> None:
        self.augment = augment
        self.mixup = mixup
        self.labels = tuple(labels)
        self.tokenizer = tokenizer
        self.label_smoothing = label_smoothing
        # Not the tokenizer's length: there are vocabularies with gaps.
        self.vocabulary = vocabulary or max(tokenizer.get_vocab().values()) + 1
        self.positions = positions

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """Pad on the tokenizer's side: `input_ids`, `attention_mask`, of pairs `token_type_ids` (B, L); labels (B,), or
        (B, classes) where texts are mixed.
        """
        columns = {name: list(rows[name]) for name in ("input_ids", "token_type_ids") if name in rows}
        labels, targets, size = rows["label"], self.targets, len(rows["label"])
        if self.mixup and "epoch" in rows:
            mixed = list(map(self.mixup, columns["input_ids"], labels, rows["epoch"], rows["id"]))
            columns["input_ids"], labels, targets = [one[0] for one in mixed], [one[1] for one in mixed], torch.float32
        elif self.augment and "epoch" in rows:
            columns["input_ids"] = list(map(self.augment, columns["input_ids"], rows["epoch"], rows["id"]))
        inputs = self.tokenizer.pad(columns, return_tensors="pt")
        return Batch(
            inputs={name: inputs[name] for name in (*columns, "attention_mask")},
            labels=torch.tensor(labels, dtype=targets),
            weights=torch.zeros(size) if empty else torch.ones(size),
            ids=[] if empty else list(rows["id"]),
        )

    def filled(self, batch: Batch, size: int, length: int) -> Batch:
        """With padding on the right, and samples of one padding token."""
        count, width = batch.inputs["attention_mask"].shape
        more, wider = size - count, min(length, self.positions or length) - width
        padding = {"input_ids": self.tokenizer.pad_token_id}
        inputs = {
            name: F.pad(tensor, (0, wider, 0, more), value=padding.get(name, 0))
            for name, tensor in batch.inputs.items()
        }
        inputs["attention_mask"][count:, 0] = 1
        labels = F.pad(batch.labels, (*(0, 0) * (batch.labels.ndim - 1), 0, more))
        weights = F.pad(batch.weights, (0, more))
        return replace(batch, inputs=inputs, labels=labels, weights=weights)

    def problem(self, row: Mapping[str, Any]) -> str:
        """No tokens, too many, one without an embedding, or a label that is no class."""
        if why := problem_of_tokens(row["input_ids"], self.vocabulary, self.positions):
            return why
        return self._problem_of_label(row["label"])

    def _problem_of_label(self, label: Any) -> str:
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(self.labels):
            return f"label {label!r:.40} is not among the {len(self.labels)} classes"
        return ""

    def title(self, batch: Batch, row: int) -> str:
        """The class, or the share of each."""
        label = batch.labels[row]
        if not label.ndim:
            return f"label: {self.labels[int(label)]}"
        shares = zip(self.labels, label.tolist(), strict=True)
        return "label: " + " + ".join(f"{share:.2f} {name}" for name, share in shares if share)

    def units(self, batch: Batch) -> int:
        """Samples that count."""
        return len(batch.ids)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Smoothed cross-entropy, summed over the samples."""
        return self._cross_entropy(outputs, batch, self.label_smoothing)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Confusion matrix (true class, predicted class), plain cross-entropy and number of samples."""
        classes = len(self.labels)
        cells = batch.labels * classes + outputs.logits.argmax(-1)
        confusion = torch.bincount(cells, weights=batch.weights.double(), minlength=classes**2)
        return {
            "confusion": confusion.view(classes, classes),
            "loss": self._cross_entropy(outputs, batch, 0.0).double(),
            "units": batch.weights.double().sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Accuracy, macro precision, recall and F1, loss, the confusion matrix and a row for each class."""
        confusion = counts["confusion"].cpu().numpy().astype(np.int64)
        hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        precision, recall, f1 = _share(hits, predicted), _share(hits, support), _share(2 * hits, predicted + support)
        units = float(counts["units"])
        return {
            "accuracy": float(confusion.trace() / units),
            "macro_precision": float(precision.mean()),
            "macro_recall": float(recall.mean()),
            "macro_f1": float(f1.mean()),
            "loss": float(counts["loss"]) / units,
            "units": int(units),
            "confusion": confusion.tolist(),
            "per_class": [
                {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
                for label, p, r, f, s in zip(self.labels, precision, recall, f1, support, strict=True)
            ],
        }

    @staticmethod
    def _cross_entropy(outputs: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        logits = outputs.logits.float()
        losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=label_smoothing)
        return (losses * batch.weights).sum()


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Their ratio, and 0 of nothing."""
    return part / np.maximum(whole, 1)
