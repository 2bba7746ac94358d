"""Varied images: the same for the same seed, epoch and sample, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from toolkit.config import AugmentConfig
from toolkit.data.images import Augmentation

SIDE, CLASSES = 28, 5
ALL = AugmentConfig(shift=0.1, crop=0.7, rotate=20, flip=True, colour=0.3, mixup=0.4, cutmix=1.0)
PLAIN = AugmentConfig(shift=0, rotate=0)


def pool() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (40, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8), torch.arange(40) % CLASSES


def made(config: AugmentConfig, seed: int = 0) -> Augmentation:
    pixels, labels = pool()

    def partners(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return pixels[list(rows)], labels[list(rows)]

    return Augmentation(config, seed=seed, rows=40, partners=partners, classes=CLASSES)


def varied(config: AugmentConfig, ids: list[int], epoch: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = pool()
    return made(config, seed)(pixels[ids], labels[ids], ids, epoch)


def test_an_image_is_varied_alike_in_any_batch() -> None:
    together, shares = varied(ALL, list(range(32)))
    for ids in ([5], [31, 5, 2], list(range(4, 20))):
        pixels, own = varied(ALL, ids)
        at = ids.index(5)
        assert torch.equal(pixels[at], together[5])
        assert torch.equal(own[at], shares[5])


def test_epochs_seeds_and_samples_differ() -> None:
    found = [varied(ALL, [7], epoch, seed)[0] for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert not any(torch.equal(one, other) for one, other in ((found[0], found[1]), (found[0], found[2])))
    assert torch.equal(varied(ALL, [7], 1)[0], found[1])
    pixels, labels = pool()
    first = made(ALL)(pixels[[7, 7]], labels[[7, 7]], [1, 2], 0)[0]
    assert not torch.equal(first[0], first[1])


def test_nothing_asked_for_changes_nothing() -> None:
    pixels, labels = varied(PLAIN, [1, 2, 3])
    assert torch.equal(pixels, pool()[0][1:4].float())
    assert torch.equal(labels, pool()[1][1:4])


def test_flip_mirrors_every_other_image() -> None:
    ids = list(range(40))
    pixels, _ = varied(AugmentConfig(shift=0, rotate=0, flip=True), ids)
    plain = pool()[0].float()
    flipped = [torch.allclose(new, old.flip(-1), atol=1e-2) for new, old in zip(pixels, plain, strict=True)]
    kept = [torch.allclose(new, old, atol=1e-2) for new, old in zip(pixels, plain, strict=True)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 10 <= sum(flipped) <= 30


def test_a_shift_moves_by_whole_places() -> None:
    """A bright dot moves by up to the share that was asked for, and by no more."""
    dot = torch.zeros(40, 1, SIDE, SIDE)
    dot[:, :, 14, 14] = 255
    moved, _ = made(AugmentConfig(shift=0.1, rotate=0))(dot, pool()[1], list(range(40)), 0)
    at = np.array([np.unravel_index(int(image.argmax()), (SIDE, SIDE)) for image in moved[:, 0]]) - 14
    assert 2 <= np.abs(at).max() <= 3
    assert len(np.unique(at, axis=0)) > 10


def test_a_quarter_turn() -> None:
    augmentation = made(AugmentConfig(shift=0, rotate=90))
    drawn = [augmentation.draw(sample, 0).places for sample in range(300)]
    angles = np.degrees(np.arctan2([rows[1][0] for rows in drawn], [rows[0][0] for rows in drawn]))
    assert -90 <= angles.min() < -80
    assert 80 < angles.max() <= 90


def test_colours_change_within_their_bounds() -> None:
    grey = torch.full((40, 3, 4, 4), 100.0)
    pixels, _ = made(AugmentConfig(shift=0, rotate=0, colour=0.2))(grey, pool()[1], list(range(40)), 0)
    means = pixels.mean((1, 2, 3))
    assert 80 <= float(means.min()) < 90
    assert 110 < float(means.max()) <= 120
    assert torch.allclose(pixels.std(1), torch.zeros(40, 4, 4), atol=1e-3)  # grey stays grey


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_shared_out_as_the_pixels_are(kind: str) -> None:
    """Classes are as bright as their number: the brightness of a mixture tells the shares."""
    labels = torch.arange(40) % CLASSES
    flat = (50.0 * labels)[:, None, None, None].expand(40, 1, SIDE, SIDE)

    def partners(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return flat[list(rows)], labels[list(rows)]

    config = AugmentConfig(shift=0, rotate=0, **{kind: 1.0})
    augmentation = Augmentation(config, seed=0, rows=40, partners=partners, classes=CLASSES)
    pixels, shares = augmentation(flat, labels, list(range(40)), 0)
    assert shares.shape == (40, CLASSES)
    assert torch.allclose(shares.sum(1), torch.ones(40))
    expected = (shares * 50 * torch.arange(CLASSES)).sum(1)
    # Of a rectangle, the edges are rounded to whole pixels.
    assert float((pixels.mean((1, 2, 3)) - expected).abs().max()) < (0.01 if kind == "mixup" else 15)
    assert int(((shares > 0).sum(1) == 2).sum()) > 20
