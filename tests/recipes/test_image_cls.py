"""The recipe of images through the real launcher, on one process and on two, and what it leaves behind."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.images import digits, png, write_folder
from tests.ranks import on_ranks
from tests.recipes.launching import assert_same_curve, launch, learn, read, recipe
from toolkit.cli import main as toolkit
from toolkit.data.images import load_processor
from toolkit.networks import ImageCnnForImageClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 files of each of three digits."""
    return write_folder(tmp_path_factory.mktemp("data") / "digits", digits(40, "012"))


@pytest.fixture
def job(folder: Path) -> list[str]:
    """Options of a run that takes seconds; epochs of 84 images, so that the last step of each has 4."""
    return [
        *("--data.name", str(folder), "--model.sizes", "8", "16", "--optim.lr", "1e-2", "--augment.cutmix", "1"),
        *("--train.global_batch", "16", "--train.steps", "12", "--train.eval_batch", "7"),
        *("--precision", "fp32", "--run.log_every", "1", "--run.dir", "run"),
    ]


def unframed(text: str) -> str:
    """What a framed message says, on one line."""
    return text


def run(ranks: int, options: list[str], cwd: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    learn("image_cls", ranks, options, cwd)
    return read(cwd / "run")


def test_the_same_numbers_on_one_process_and_on_two(job: list[str], tmp_path: Path) -> None:
    alone, report = run(1, job, tmp_path / "single")
    assert [line["units"] for line in alone][:6] == [16, 16, 16, 16, 16, 4]
    assert report["test"]["loss"] < report["before"]["loss"]
    for strategy in ("ddp", "fsdp", "zero2"):
        lines, other = run(2, [*job, "--strategy.name", strategy], tmp_path / strategy)
        assert_same_curve(lines, alone)
        for when in ("before", "test"):
            assert other[when]["confusion"] == report[when]["confusion"]
            assert other[when]["loss"] == pytest.approx(report[when]["loss"], rel=1e-5)
            assert [m["id"] for m in other[when]["mistakes"]] == [m["id"] for m in report[when]["mistakes"]]


def test_launched_with_networks_of_every_kind(job: list[str], tmp_path: Path) -> None:
    """EfficientNet, with frozen statistics of its norms, under the launcher; the others in processes that are there."""
    options = [*job[:2], *job[9:], "--train.global_batch", "16", "--train.steps", "3", "--optim.lr", "1e-3"]
    pretrained = [*options, "--model.name", "sample:efficientnet-lite0", "--model.image_size", "32"]
    pretrained += ["--model.dropout", "0"]
    done = launch([*pretrained, "--strategy.name", "fsdp"], config="cpu2", cwd=tmp_path, name="image_cls")
    assert done.returncode == 0, done.stdout
    two, report = read(tmp_path / "run")
    assert report["plan"]["data"]["images"].startswith("32 x 32 pixels, colours; mean 0.498")
    alone, _ = run(1, pretrained, tmp_path / "alone")
    assert_same_curve(two, alone)
    for network in ("mlp", "vit"):
        lines, report = run(1, [*options, "--model.network", network, "--precision", "bf16"], tmp_path / network)
        assert len(lines) == 3
        assert "padding" not in report["plan"]["training"]


def test_it_goes_on_where_it_was(job: list[str], tmp_path: Path) -> None:
    whole, _ = run(1, job, tmp_path / "whole")
    part = tmp_path / "part"
    run(1, [*job, "--train.steps", "7", "--optim.schedule", "constant"], part)
    code, text = on_ranks(
        recipe, 2, [*job, "--optim.schedule", "constant", "--checkpoint.allow_change", "train.steps"], str(part), None,
        "image_cls",
    )[0]  # fmt: skip
    assert code == 0, text
    assert "goes on" in text
    straight, _ = run(1, [*job, "--optim.schedule", "constant"], tmp_path / "straight")
    resumed, _ = read(part / "run")
    assert [m["loss"] for m in resumed] == pytest.approx([m["loss"] for m in straight], rel=1e-5)
    assert len(whole) == len(resumed) == 12


def test_what_is_left_behind(
    job: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = run(1, [*job, "--train.steps", "40"], tmp_path)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in page
    assert len(report["mistakes"]) == sum(map(sum, report["test"]["confusion"])) - sum(
        row[index] for index, row in enumerate(report["test"]["confusion"])
    )
    assert page.count("data:image/png;base64,") == len(report["mistakes"])
    for mistake in report["mistakes"]:
        assert base64.b64decode(mistake["image"]).startswith(b"\x89PNG")
        assert mistake["label"] == Path(mistake["where"]).parent.name != mistake["predicted"]

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    assert isinstance(model, ImageCnnForImageClassification)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    Image.open(folder / "0" / "0000.png").convert("RGBA").save("zero.webp", lossless=True)
    files = [str(folder / "1"), "zero.webp"]
    assert toolkit(["predict", "run", *files, "--json", "--top", "2"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 41
    assert [answer["file"] for answer in answers] == [*map(str, sorted((folder / "1").iterdir())), "zero.webp"]
    for answer in answers[::13]:
        pixels = processor(Image.open(answer["file"]).convert("L"), return_tensors="pt")["pixel_values"]
        scores = model(pixels).logits.detach().softmax(-1)[0]
        assert answer["label"] == model.config.id2label[int(scores.argmax())]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-4)
        assert answer["label_2"] != answer["label"]
    right = sum(answer["label"] == "1" for answer in answers[:40]) / 40
    assert right > 0.7

    assert toolkit(["checkpoint", "export", "run", "exported"]) == 0
    exported, written = (load_file(tmp_path / f / "model.safetensors") for f in ("exported", "run/model"))
    assert exported.keys() == written.keys()
    assert all(torch.equal(exported[name], written[name]) for name in written)
    assert load_processor(tmp_path / "exported") == load_processor(tmp_path / "run" / "model")
    capsys.readouterr()

    (tmp_path / "broken.png").write_bytes(png(Image.new("L", (20, 20)))[:40])
    assert toolkit(["predict", "run", "broken.png"]) == 2
    assert "broken.png cannot be answered" in unframed(capsys.readouterr().err)
    (tmp_path / "nothing").mkdir()
    assert toolkit(["predict", "run", "nothing"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--augment.colour", "0.2"], "--augment.colour has no effect on grey images"),
        (["--run.show", "2"], "--run.show has no effect on the recipe image_cls"),
        (["--train.cuda_graphs", "True"], "cuda_graphs"),
        (["--data.image", "label"], "--data.image and --data.label both name the column"),
        (["--model.network", "mlp", "--model.heads", "2", "--model.sizes", "8"], "--model.heads has no effect"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    text = learn("image_cls", 1, [*job, *options], tmp_path, 2)
    assert said in unframed(text)
