"""One class for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.config import AugmentConfig
from toolkit.data.images import Augmentation, ImageData, open_image
from toolkit.data.rows import Unfit
from toolkit.errors import ConfigError, DataError
from toolkit.tasks.base import Batch
from toolkit.tasks.classification import Classification

SHOWN = 24
"""Mistakes that are kept by name: the surest."""


class ImageClassification(Classification):
    """Cross-entropy over classes of images, which are decoded here, and in training varied.

    Where images are mixed, a label is the share of each class.

    Args:
        data: says what the classes are, and how images are prepared.
        augment: how training images are varied.
        seed: of that.
        label_smoothing: share of the target spread over all classes, in training only.

    Raises:
        ConfigError: colours are to be varied, of images that are grey.
    """

    fills_up = False

    def __init__(self, data: ImageData, augment: AugmentConfig, *, seed: int, label_smoothing: float = 0.0) -> None:
        self.labels = data.labels
        self.label_smoothing = label_smoothing
        self._processor = data.processor
        self._train = data.train
        self._held_out = max(len(data.validation), len(data.test))
        self._augmentation = None
        if augment.use and augment.colour and data.processor.channels == 1:
            raise ConfigError("--augment.colour has no effect on grey images", "Drop it, or set --data.channels rgb.")
        if augment.use:
            options: dict[str, Any] = {"rows": len(data.train), "partners": self._partners, "classes": len(data.labels)}
            self._augmentation = Augmentation(augment, seed=seed, **options)

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """`pixel_values` (B, channels, side, side); labels (B,), or (B, classes) where images are mixed.

        Raises:
            DataError: an image that was fit when the data was prepared cannot be decoded any more.
        """
        pixels, labels = self._decoded(rows)
        # There is an epoch in training alone: an evaluation sees the images as they are.
        if self._augmentation is not None and "epoch" in rows:
            pixels, labels = self._augmentation(pixels, labels, rows["id"], rows["epoch"][0])
        return Batch(
            inputs={"pixel_values": self._processor.normalise(pixels)},
            labels=labels,
            weights=torch.zeros(len(labels)) if empty else torch.ones(len(labels)),
            ids=[] if empty else list(rows["id"]),
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No image, or a label that is no class."""
        label = row["label"]
        if not row["image"]:
            return "it has no image"
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(self.labels):
            return f"label {label!r:.40} is not among the {len(self.labels)} classes"
        return ""

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """As for texts; and of each sample what the model takes it for (from 1), and how surely (2, held-out rows)."""
        score, predicted = outputs.logits.double().softmax(-1).max(-1)
        answers = torch.zeros(2, self._held_out, dtype=torch.float64, device=score.device)
        wrong = predicted != batch.labels
        count = len(batch.ids)  # none of a filler
        ids = torch.tensor(batch.ids, dtype=torch.long, device=score.device)
        answers[0, ids] = ((predicted + 1) * wrong)[:count].double()
        answers[1, ids] = (score * wrong)[:count]
        return super().measure(outputs, batch) | {"answers": answers}

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """As for texts, and the surest mistakes: `id`, `predicted` label and its probability as `score`."""
        taken_for, scores = counts["answers"].cpu().numpy()
        wrong = np.flatnonzero(taken_for)
        surest = wrong[np.argsort(-scores[wrong].round(4), kind="stable")][:SHOWN]
        mistakes = [
            {"id": int(row), "predicted": self.labels[int(taken_for[row]) - 1], "score": float(scores[row])}
            for row in surest
        ]
        return super().metrics(counts) | {"mistakes": mistakes}

    def _decoded(self, rows: Mapping[str, Sequence[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        images = []
        for data, where in zip(rows["image"], rows["where"], strict=True):
            try:
                images.append(self._processor.pixels(open_image(data)))
            except Unfit as reason:
                raise DataError(
                    f"{where} cannot be used any more: {reason}",
                    "Clear the prepared data in the cache, and start again.",
                ) from None
        return torch.stack(images), torch.tensor(rows["label"], dtype=torch.long)

    def _partners(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._decoded(self._train[list(rows)])
