"""Several labels for each sample, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from toolkit.data.text_classification import TextClassification
from toolkit.tasks.base import Batch, whole_numbers
from toolkit.tasks.classification import Classification

PROBLEMS = {"class": None, "labels": "multi_label_classification", "number": "regression"}
"""The `problem_type` of a model for each target, as transformers has them."""


class MultiLabel(Classification):
    """Binary cross-entropy of each label, in the mean over the labels; micro and macro F1 from counts.

    A sample has the labels whose probability is a half or more. Arguments as for `Classification`.
    """

    smooths_labels = False
    targets = torch.float32

    def _problem_of_label(self, label: Any) -> str:
        marks = whole_numbers(label)
        if marks is None or len(marks) != len(self.labels) or not np.isin(marks, (0, 1)).all():
            return f"its labels are not {len(self.labels)} of 0 and 1"
        return ""

    def title(self, batch: Batch, row: int) -> str:
        """The labels."""
        marks = zip(self.labels, batch.labels[row].tolist(), strict=True)
        there = [name if mark == 1 else f"{mark:.2f} {name}" for name, mark in marks if mark]
        return f"labels: {', '.join(there) or 'none'}"

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Summed over the samples."""
        losses = F.binary_cross_entropy_with_logits(outputs.logits.float(), batch.labels, reduction="none")
        return (losses.mean(-1) * batch.weights).sum()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Of each label: samples that rightly have it, that have it, that are said to (3, labels); loss and samples."""
        weights = batch.weights.double()[:, None]
        said, there = (outputs.logits >= 0).double() * weights, batch.labels.double() * weights
        return {
            "labels": torch.stack([(said * there).sum(0), there.sum(0), said.sum(0)]),
            "loss": self.loss(outputs, batch).double(),
            "units": weights.sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Micro and macro F1, loss, and a row for each label."""
        hits, there, said = counts["labels"].cpu().numpy()
        f1 = 2 * hits / np.maximum(there + said, 1)
        units = float(counts["units"])
        rows = zip(self.labels, hits / np.maximum(said, 1), hits / np.maximum(there, 1), f1, there, strict=True)
        return {
            "micro_f1": float(2 * hits.sum() / max((there + said).sum(), 1)),
            "macro_f1": float(f1.mean()),
            "loss": float(counts["loss"]) / units,
            "units": int(units),
            "per_class": [
                {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
                for name, p, r, f, s in rows
            ],
        }


class Regression(Classification):
    """Squared error of a number for each sample; correlations, R² and errors.

    A rank correlation is no sum. So each sample of an evaluation has a place of its own in a vector, by its id: summed
    over batches and processes, it holds all predictions once, and all figures are exact.

    Args:
        slots: above every id. Others as for `Classification`.
    """

    smooths_labels = False
    targets = torch.float32

    def __init__(self, *arguments: Any, slots: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.slots = slots

    def _problem_of_label(self, label: Any) -> str:
        number = isinstance(label, int | float | np.number) and math.isfinite(label)
        return "" if number else f"its label {label!r:.40} is no number"

    def title(self, batch: Batch, row: int) -> str:
        """The number."""
        return f"{self.labels[0]}: {float(batch.labels[row]):g}"

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Squared errors, summed over the samples."""
        off: torch.Tensor = outputs.logits.float().squeeze(-1) - batch.labels
        return (off.square() * batch.weights).sum()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Predictions, numbers and which there are, by id (slots, 3); squared error and number of samples."""
        found = torch.zeros(self.slots, 3, dtype=torch.float64, device=batch.labels.device)
        if batch.ids:
            said = outputs.logits.double().squeeze(-1)
            rows = torch.stack([said, batch.labels.double(), torch.ones_like(said)], dim=1)
            found[torch.tensor(batch.ids, device=found.device)] = rows
        return {
            "numbers": found,
            "loss": self.loss(outputs, batch).double(),
            "units": batch.weights.double().sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Pearson's and Spearman's correlation, R², mean absolute and root mean squared error, loss."""
        said, there, known = counts["numbers"].cpu().numpy().T
        said, there = said[known > 0], there[known > 0]
        off, units = said - there, float(counts["units"])
        spread = float(((there - there.mean()) ** 2).sum())
        return {
            "pearson": _correlation(said, there),
            "spearman": _correlation(_ranks(said), _ranks(there)),
            "r2": 1 - float((off**2).sum()) / spread if spread else 0.0,
            "mae": float(np.abs(off).mean()),
            "rmse": float(np.sqrt((off**2).mean())),
            "loss": float(counts["loss"]) / units,
            "units": int(units),
        }


def text_task(target: str, data: TextClassification, tokenizer: Any, smoothing: float, **limits: Any) -> Classification:
    """The task of a target.

    Args:
        target: class, labels or number.
        data: with its labels.
        tokenizer: pads the samples.
        smoothing: of the labels, which only classes have.
        limits: of the model; and what varies training texts.
    """
    if target == "labels":
        return MultiLabel(data.labels, tokenizer, **limits)
    if target == "number":
        slots = 1 + max(max(rows["id"]) for rows in (data.validation, data.test))
        return Regression(data.labels, tokenizer, slots=slots, **limits)
    return Classification(data.labels, tokenizer, smoothing, **limits)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def _correlation(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Pearson's; 0 where one of them is constant."""
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / norm if norm else 0.0
