"""The task of images: losses by hand, mistakes by name, and variation in training alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.images import digits
from toolkit.config import AugmentConfig
from toolkit.data.images import ImageData, ImageProcessor, open_image
from toolkit.data.loader import BatchShape, Loader
from toolkit.errors import ConfigError, DataError
from toolkit.tasks import ImageClassification

PROCESSOR = ImageProcessor(28, 1, (0.1,), (0.3,))
MIXED = AugmentConfig(mixup=0.5)


def data(each: int = 6) -> ImageData:
    rows = digits(each, "012")
    table = Dataset.from_dict(
        {
            "image": [image for image, _ in rows],
            "where": [f"row {number}" for number in range(len(rows))],
            "label": [int(label) for _, label in rows],
            "length": [1] * len(rows),
            "id": list(range(len(rows))),
        }
    )
    return ImageData(table, table, table, ("zero", "one", "two"), PROCESSOR, {}, "")


def task(augment: AugmentConfig = MIXED, **options: float) -> ImageClassification:
    return ImageClassification(data(), augment, seed=0, **options)


def test_images_are_varied_in_training_and_nowhere_else() -> None:
    found = data()
    options = {"rank": 0, "seed": 0}
    loader = Loader(found.train, task().collate, BatchShape(18, 18, 1, 1), **options)  # type: ignore[arg-type]
    plain = PROCESSOR.normalise(torch.stack([PROCESSOR.pixels(open_image(image)) for image in found.train["image"]]))
    expected = dict(zip(found.train["id"], plain, strict=True))
    (held_out,) = loader.once()
    assert all(torch.equal(x, expected[i]) for i, x in zip(held_out.ids, held_out.inputs["pixel_values"], strict=True))
    assert held_out.labels.dtype == torch.long
    first, second = loader.steps(2)
    for step in (first, second):
        (batch,) = step.micro_batches
        assert not any(
            torch.equal(x, expected[i]) for i, x in zip(batch.ids, batch.inputs["pixel_values"], strict=True)
        )
        assert batch.labels.shape == (18, 3)
    one, other = (dict(zip(b.ids, b.inputs["pixel_values"], strict=True)) for b in (first.micro_batches[0], batch))
    assert not torch.equal(one[3], other[3]), "another epoch varies otherwise"
    (again,) = next(iter(loader.steps(2, from_step=1))).micro_batches
    assert again.ids == batch.ids
    assert torch.equal(again.inputs["pixel_values"], batch.inputs["pixel_values"]), "what is resumed is the same"


def test_not_at_all_where_that_is_asked_for() -> None:
    rows = data().train[[0, 1]]
    off = task(AugmentConfig(use=False, mixup=1.0))
    assert torch.equal(
        off.collate(rows | {"epoch": [3, 3]}, False).inputs["pixel_values"],
        off.collate(rows, False).inputs["pixel_values"],
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_shared_labels(smoothing: float) -> None:
    rows = data().train[[0, 7, 14]]
    batch = task(label_smoothing=smoothing).collate(rows | {"epoch": [0] * 3}, False)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    targets = (1 - smoothing) * batch.labels + smoothing / 3
    expected = -(targets * F.log_softmax(logits, -1)).sum()
    found = task(label_smoothing=smoothing).loss(SimpleNamespace(logits=logits), batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_mistakes_are_named_the_surest_first() -> None:
    one = task()
    counts: dict[str, torch.Tensor] = {}
    # Of the first six, all zeros: two are taken for something else; a filler is taken for another, and does not count.
    logits = torch.tensor([[5.0, 0, 0]] * 6)
    logits[2], logits[4] = torch.tensor([0, 1.0, 0]), torch.tensor([0, 0, 6.0])
    parts = [(one.collate(data().test[list(range(6))], False), logits)]
    parts += [(one.collate(data().test[[0]], True), torch.tensor([[0.0, 9, 0]]))]
    for batch, answers in parts:
        for name, count in one.measure(SimpleNamespace(logits=answers), batch).items():
            counts[name] = counts.get(name, torch.zeros_like(count)) + count
    metrics = one.metrics(counts)
    assert metrics["units"] == 6
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert [(m["id"], m["predicted"]) for m in metrics["mistakes"]] == [(4, "two"), (2, "one")]
    score = float(np.exp(6) / (np.exp(6) + 2))
    assert metrics["mistakes"][0]["score"] == pytest.approx(score, rel=1e-6)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"augment\.colour has no effect on grey images"):
        task(AugmentConfig(colour=0.2))
    row = {"image": b"", "label": 1}
    assert task().problem(row) == "it has no image"
    assert "is not among the 3 classes" in task().problem({"image": b"x", "label": 3})
    with pytest.raises(DataError, match="row 0 cannot be used any more: it is no image"):
        task().collate(data().train[[0]] | {"image": [b"broken"]}, False)
