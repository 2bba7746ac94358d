"""SpecAugment (Park et al. 2019): stretches of time and bands of frequencies are blanked out of a spectrogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SpecAugment:
    """How much is blanked out; what, is a pure function of (seed, epoch, sample).

    Attributes:
        time_masks: stretches of time.
        time_share: the longest of them, as a share of the frames with sound.
        mel_masks: bands of frequencies.
        mel_bands: the widest of them.
        seed: of the run.
    """

    time_masks: int
    time_share: float
    mel_masks: int
    mel_bands: int
    seed: int

    def apply(self, features: torch.Tensor, frames: int, epoch: int, sample: int) -> None:
        """Set masks of a log-mel spectrogram to 0, about the mean of one, in place.

        Args:
            features: (mel bands, frames) of one clip.
            frames: of them with sound; the others are padding.
            epoch, sample: which epoch, and the sample's id.
        """
        draw = np.random.default_rng([self.seed, epoch, sample])
        for _ in range(self.time_masks):
            begin, end = _stretch(draw, frames, int(self.time_share * frames))
            features[:, begin:end] = 0
        for _ in range(self.mel_masks):
            begin, end = _stretch(draw, len(features), min(self.mel_bands, len(features) - 1))
            features[begin:end] = 0


def _stretch(draw: np.random.Generator, whole: int, longest: int) -> tuple[int, int]:
    """Of any length up to `longest`, anywhere in `whole`."""
    length = int(draw.integers(longest + 1))
    begin = int(draw.integers(whole - length + 1))
    return begin, begin + length
