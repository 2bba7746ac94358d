"""Rows of tables: a measurement or a class of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.data.tables import Preprocessor, TargetScale
from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification

BINS = 40
"""Of the range of the target, for the plots of a test."""


def collate_rows(rows: Mapping[str, Sequence[Any]], empty: bool, dtype: torch.dtype) -> Batch:
    """`numbers` (B, numbers) fp32 and `categories` (B, columns); targets (B,) as labels."""
    size = len(rows["target"])
    return Batch(
        inputs={
            "numbers": torch.from_numpy(np.asarray(rows["numbers"], np.float32).reshape(size, -1)),
            "categories": torch.from_numpy(np.asarray(rows["categories"], np.int64).reshape(size, -1)),
        },
        labels=torch.as_tensor(rows["target"], dtype=dtype),
        weights=torch.zeros(size) if empty else torch.ones(size),
        ids=[] if empty else list(rows["id"]),
    )


def problem_of_row(row: Mapping[str, Any], preprocessor: Preprocessor) -> str:
    """Why this row cannot be learnt from, or an empty string."""
    numbers, categories = row["numbers"], row["categories"]
    if len(numbers) != preprocessor.number_count or not all(map(math.isfinite, numbers)):
        return f"its numbers are not {preprocessor.number_count} that are finite"
    sizes = preprocessor.category_sizes
    if len(categories) != len(sizes) or any(not 0 <= c < size for c, size in zip(categories, sizes, strict=True)):
        return "its categories are not those of the columns"
    return ""


class TableRegression(Task):
    """Squared error of the scaled target; R², errors and correlation in the target's own units, from sums alone.

    Args:
        preprocessor: of the rows; its scale is that of the target.
    """

    unit = "samples"

    def __init__(self, preprocessor: Preprocessor) -> None:
        assert preprocessor.scale is not None, "classes have no scale"
        self.preprocessor = preprocessor
        self.scale: TargetScale = preprocessor.scale
        # Squares of values around 0 lose no digits.
        self.centre = float(self.scale.units(torch.zeros(())))

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """Targets in fp64, in their own units."""
        return collate_rows(rows, empty, torch.float64)

    def problem(self, row: Mapping[str, Any]) -> str:
        """Numbers that are not finite, or categories or a target that are none."""
        if why := problem_of_row(row, self.preprocessor):
            return why
        target = row["target"]
        return "" if isinstance(target, (int, float)) and math.isfinite(target) else f"its target is {target!r:.40}"

    def units(self, batch: Batch) -> int:
        """Samples that count."""
        return len(batch.ids)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Squared error of the scaled target, summed over the samples."""
        learnt = self.scale.learnt(batch.labels).float()
        squares: torch.Tensor = (outputs.logits.squeeze(-1).float() - learnt).square()
        return (squares * batch.weights).sum()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums of targets, answers, errors, their squares and products, and how they lie in `BINS` of the range."""
        scaled = outputs.logits.squeeze(-1).double()
        weights = batch.weights.double()
        true, found = batch.labels - self.centre, self.scale.units(scaled) - self.centre
        error = found - true
        columns = [true, found, true**2, found**2, true * found, error.abs(), error**2]
        rows, places = self._bins(self.scale.learnt(batch.labels)), self._bins(scaled)
        grid = torch.bincount(rows * BINS + places, weights, BINS**2).view(BINS, BINS)
        by_place = torch.stack([torch.bincount(places, weights * of, BINS) for of in (error, error**2)])
        return {
            "sums": torch.stack([(column * weights).sum() for column in columns]),
            "grid": grid,
            "errors": by_place,
            "loss": self.loss(outputs, batch).double(),
            "units": weights.sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """R², mean absolute and root mean squared error, correlation, loss, and the bins for plots."""
        units = float(counts["units"])
        true, found, true2, found2, product, absolute, squared = (counts["sums"] / max(units, 1)).tolist()
        spread, of_found = true2 - true**2, found2 - found**2
        grid = counts["grid"]
        inside = grid.sum(0).clamp(min=1)
        mean = counts["errors"][0] / inside
        deviation = (counts["errors"][1] / inside - mean**2).clamp(min=0).sqrt()
        edges = torch.linspace(self.scale.low, self.scale.high, BINS + 1, dtype=torch.float64)
        return {
            "r2": 1 - squared / spread if spread > 0 else math.nan,
            "mae": absolute,
            "rmse": math.sqrt(squared),
            "pearson": (product - true * found) / math.sqrt(spread * of_found) if spread * of_found > 0 else 0.0,
            "loss": float(counts["loss"]) / max(units, 1),
            "units": int(units),
            "answers": {
                "edges": self.scale.units(edges).tolist(),
                "grid": grid.long().tolist(),
                "error": mean.tolist(),
                "deviation": deviation.tolist(),
            },
        }

    def _bins(self, scaled: torch.Tensor) -> torch.Tensor:
        """Where in the range of the training targets; what lies beyond is in the outermost."""
        share = (scaled - self.scale.low) / (self.scale.high - self.scale.low)
        return (share.nan_to_num() * BINS).long().clamp(0, BINS - 1)


class TableClassification(Classification):
    """Classes of rows, with the figures of any classification.

    Args:
        preprocessor: of the rows; its labels are the classes.
        label_smoothing: share of the target spread over all classes, in training only.
    """

    fills_up = False

    def __init__(self, preprocessor: Preprocessor, label_smoothing: float = 0.0) -> None:
        super().__init__(preprocessor.labels, None, label_smoothing, vocabulary=1)
        self.preprocessor = preprocessor

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """Targets as indices of classes."""
        return collate_rows(rows, empty, torch.long)

    def problem(self, row: Mapping[str, Any]) -> str:
        """Numbers that are not finite, or categories or a class that are none."""
        if why := problem_of_row(row, self.preprocessor):
            return why
        target = row["target"]
        known = isinstance(target, int) and 0 <= target < len(self.labels)
        return "" if known else f"its target {target!r:.40} is not among the {len(self.labels)} classes"


def table_task(preprocessor: Preprocessor, label_smoothing: float) -> Task:
    """What is to be predicted: a measurement or a class; smoothing of a measurement is the session's to refuse."""
    if preprocessor.labels:
        return TableClassification(preprocessor, label_smoothing)
    return TableRegression(preprocessor)
