"""Training images, varied: a pure function of the seed, the epoch and the image, on any number of processes.

Nothing depends on the other images of a batch, nor on their order. What another image is blended with is drawn from all
training images, not from the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.config import AugmentConfig

Images = tuple[torch.Tensor, torch.Tensor]
"""Pixels (B, channels, side, side) from 0 to 255, and classes (B,)."""
Partners = Callable[[Sequence[int]], Images]
"""The training images of some rows."""


@dataclass(frozen=True)
class Drawn:
    """What is done to one image.

    Attributes:
        places: of the result's places to those of the image, both from −1 to 1: (2, 3).
        colour: factors of brightness, contrast and saturation.
        partner: row of the image that it is mixed with; −1 for none.
        keep: share of its label that it keeps.
        box: of the partner that is put into it (top, left, bottom, right), in shares of the side; None blends them.
    """

    places: tuple[tuple[float, float, float], tuple[float, float, float]]
    colour: tuple[float, float, float]
    partner: int
    keep: float
    box: tuple[float, float, float, float] | None


class Augmentation:
    """Varies the images of a batch.

    Args:
        config: how.
        seed: of the run.
        rows: of the training data, from which partners are drawn.
        partners: reads them.
        classes: there are.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, rows: int, partners: Partners, classes: int) -> None:
        self.config = config
        self._seed = seed
        self._rows = rows
        self._partners = partners
        self._classes = classes

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, ids: Sequence[int], epoch: int) -> Images:
        """The same images, varied: fp32 from 0 to 255; and the share of each class (B, classes) where they are mixed.

        Args:
            pixels: (B, channels, side, side) from 0 to 255.
            labels: (B,) classes.
            ids: of the samples.
            epoch: from 0.
        """
        drawn = [self.draw(sample, epoch) for sample in ids]
        pixels = _vary(pixels.float(), drawn)
        if not (self.config.mixup or self.config.cutmix):
            return pixels, labels
        others, theirs = self._partners([one.partner for one in drawn])
        # A partner is varied like the image that it is mixed into.
        pixels = _mix(pixels, _vary(others.float(), drawn), drawn)
        keep = torch.tensor([one.keep for one in drawn])[:, None]
        own, other = (F.one_hot(classes, self._classes).float() for classes in (labels, theirs))
        return pixels, keep * own + (1 - keep) * other

    def draw(self, sample: int, epoch: int) -> Drawn:
        """What is done to a sample in an epoch."""
        config, rng = self.config, np.random.default_rng([self._seed, epoch, sample])
        # As many numbers for each, so that one setting does not change what another one draws.
        angle, across, down, size, at_x, at_y, mirrored, *colours = rng.uniform(-1, 1, 10).tolist()
        kept = 1 - (1 - config.crop) * (size + 1) / 2
        turn = math.radians(config.rotate) * angle
        sign = -1.0 if config.flip and mirrored < 0 else 1.0
        # Moving by a share of the side is twice as much where the sides go from −1 to 1.
        x = (1 - kept) * at_x + 2 * config.shift * across
        y = (1 - kept) * at_y + 2 * config.shift * down
        rows = (
            (sign * kept * math.cos(turn), -sign * kept * math.sin(turn), sign * x),
            (kept * math.sin(turn), kept * math.cos(turn), y),
        )
        colour = (1 + config.colour * colours[0], 1 + config.colour * colours[1], 1 + config.colour * colours[2])
        return Drawn(rows, colour, *self._draw_mix(rng))

    def _draw_mix(self, rng: np.random.Generator) -> tuple[int, float, tuple[float, float, float, float] | None]:
        mixup, cutmix = self.config.mixup, self.config.cutmix
        if not (mixup or cutmix):
            return -1, 1.0, None
        partner = int(rng.integers(self._rows))
        cut = bool(cutmix and (not mixup or rng.random() < 0.5))
        spread = cutmix if cut else mixup
        keep = float(rng.beta(spread, spread))
        if not cut:
            return partner, keep, None
        half = math.sqrt(1 - keep) / 2
        y, x = rng.uniform(0, 1, 2).tolist()
        box = (max(0.0, y - half), max(0.0, x - half), min(1.0, y + half), min(1.0, x + half))
        return partner, 1 - (box[2] - box[0]) * (box[3] - box[1]), box


def _vary(pixels: torch.Tensor, drawn: Sequence[Drawn]) -> torch.Tensor:
    """Moved, turned, cut and coloured, each image by its own numbers."""
    pixels = _moved(pixels, torch.tensor([one.places for one in drawn]))
    colour = torch.tensor([one.colour for one in drawn])
    if bool((colour == 1).all()):
        return pixels
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in colour.unbind(1))
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + saturation * (pixels - grey)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    return (brightness * (middle + contrast * (pixels - middle))).clamp(0, 255)


def _moved(pixels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Each image read at the places that its map (B, 2, 3) leads to; mirrored at the edges."""
    if bool((maps == torch.eye(2, 3)).all()):
        return pixels
    side = pixels.shape[-1]
    places = (torch.arange(side) * 2 + 1) / side - 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    # Written out: a product of matrices rounds otherwise in a batch of another size.
    a, b, c = (maps[:, :, column, None, None] for column in range(3))
    grid = (a * x + b * y + c).permute(0, 2, 3, 1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _mix(pixels: torch.Tensor, others: torch.Tensor, drawn: Sequence[Drawn]) -> torch.Tensor:
    side = pixels.shape[-1]
    mixed = pixels.clone()
    for row, one in enumerate(drawn):
        if one.box is None:
            mixed[row] = one.keep * pixels[row] + (1 - one.keep) * others[row]
        else:
            top, left, bottom, right = (round(side * edge) for edge in one.box)
            mixed[row, :, top:bottom, left:right] = others[row, :, top:bottom, left:right]
    return mixed
