"""Networks of our own for images: what they compute, and that they are saved and loaded as those of transformers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from toolkit.config import ImageModelConfig
from toolkit.data.images import ImageProcessor
from toolkit.errors import ConfigError, ModelError
from toolkit.image_models import image_input, load_image_classifier
from toolkit.models import repeated_blocks
from toolkit.networks.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from toolkit.samples import SAMPLES, fetch
from toolkit.samples._archives import obtain, unpack

LABELS = ("cat", "dog", "owl")
GREY = ImageProcessor(28, 1, (0.1,), (0.3,))
NEW = {
    "mlp": ImageModelConfig(network="mlp"),
    "cnn": ImageModelConfig(network="cnn"),
    "vit": ImageModelConfig(network="vit", layers=2, hidden_size=32),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Where cores are busy with other things, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(side: int = 28, channels: int = 1, count: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_efficientnet_answers_as_the_package_that_its_weights_are_from(tmp_path: Path) -> None:
    theirs = dataclasses.replace(
        SAMPLES["efficientnet-lite0"],
        package="efficientnet-lite-pytorch",
        archive="efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
        sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    )
    (tmp_path / "download").mkdir()
    unpack(obtain(theirs, tmp_path / "nothing", tmp_path / "download"), "efficientnet_lite_pytorch/*", tmp_path)
    unpack(obtain(SAMPLES["efficientnet-lite0"], tmp_path / "nothing", tmp_path / "download"), "*.pth", tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    (weights,) = tmp_path.rglob("*.pth")
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    model, report = EfficientNetLiteForImageClassification.from_pretrained(
        fetch("efficientnet-lite0"), output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == SAMPLES["efficientnet-lite0"].facts["parameters"]
    pixels = images(96, 3, 2)
    assert torch.allclose(model.eval()(pixels).logits, reference(pixels), atol=1e-4)


def test_efficientnet_knows_a_photo() -> None:
    """Prepared by its processor, a picture of a flower is a daisy (class 985 of ImageNet)."""
    datasets = pytest.importorskip("sklearn.datasets")
    processor = image_input(ImageModelConfig(name="sample:efficientnet-lite0"))
    assert (processor.size, processor.edge, processor.channels) == (224, 256, 3)
    model = EfficientNetLiteForImageClassification.from_pretrained(fetch("efficientnet-lite0")).eval()
    photo = processor.pixels(Image.fromarray(datasets.load_sample_image("flower.jpg")))
    with torch.no_grad():
        scores = model(processor.normalise(photo)[None]).logits.softmax(-1)
    assert int(scores.argmax()) == 985
    assert float(scores.max()) > 0.3


@pytest.mark.parametrize("name", NEW)
def test_an_image_has_the_same_answer_in_any_batch_and_mode(name: str) -> None:
    model = load_image_classifier(NEW[name], LABELS, GREY, seed=0)
    together = model.train()(images()).logits
    assert together.shape == (3, 3)
    for row in range(3):
        assert torch.allclose(model.eval()(images()[[row]]).logits, together[[row]], atol=1e-6)


def test_statistics_of_norms_stay_in_training() -> None:
    config = EfficientNetLiteConfig(
        stages=((2, 3, 2, 2, 8),), stem_channels=8, top_channels=16, num_labels=3, dropout=0
    )
    model = EfficientNetLiteForImageClassification(config).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("running_var" in name for name in before)
    logits = model(images(16, 3)).logits
    logits.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())
    assert torch.allclose(model(images(16, 3)[[1]]).logits, logits[[1]], atol=1e-6)
    assert model.bfloat16()(images(16, 3).bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NEW)
def test_new_networks_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = load_image_classifier(NEW[name], LABELS, GREY, seed=3)
    again = load_image_classifier(NEW[name], LABELS, GREY, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert len(repeated_blocks(model)) >= 2, "FSDP shards by them"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)
    GREY.save_pretrained(tmp_path)
    more = ImageModelConfig(name=str(tmp_path))
    assert image_input(more) == GREY
    head = load_image_classifier(more, ("a", "b"), GREY, seed=0)
    assert head(images()).logits.shape == (3, 2)


def test_sizes_that_are_asked_for() -> None:
    mlp = load_image_classifier(ImageModelConfig(network="mlp"), LABELS, GREY, seed=0)
    assert [tuple(layer.weight.shape) for layer in mlp.hidden] == [(256, 784), (128, 256), (64, 128)]
    cnn = load_image_classifier(ImageModelConfig(sizes=(8, 16), dropout=0.5), LABELS, ImageProcessor(32, 3), seed=0)
    assert [stage.conv1.weight.shape[:2] for stage in cnn.stages] == [(8, 3), (16, 8)]
    assert cnn.dropout.p == 0.5
    larger = dataclasses.replace(NEW["cnn"], image_size=64)
    assert image_input(larger).size == 64
    smaller = image_input(ImageModelConfig(name="sample:efficientnet-lite0", image_size=112))
    assert (smaller.size, smaller.edge) == (112, 128)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ImageModelConfig(sizes=(12,)), "multiples of 8"),
        (ImageModelConfig(sizes=(8,) * 6), "cannot be halved 6 times"),
        (ImageModelConfig(network="vit", hidden_size=30), "no multiple of --model.heads"),
        (ImageModelConfig(network="vit", patch_size=5), "cannot be cut into squares of 5"),
        (ImageModelConfig(network="vit", sizes=(8,)), r"--model\.sizes has no effect on a new vit"),
        (ImageModelConfig(layers=3), r"--model\.layers has no effect on a new cnn"),
        (ImageModelConfig(revision="main"), r"--model\.revision has no effect on a new cnn"),
        (ImageModelConfig(name="sample:minilm", heads=2), r"--model\.heads has no effect on the weights"),
        (ImageModelConfig(name="sample:mnist"), "is a data sample"),
        (ImageModelConfig(freeze=("nothing",)), "matches no parameter"),
    ],
)
def test_what_is_refused(config: ImageModelConfig, said: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        load_image_classifier(config, LABELS, dataclasses.replace(GREY, size=image_input(config).size), seed=0)
