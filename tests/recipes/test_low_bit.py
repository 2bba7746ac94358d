"""A run on a base of low bits: it learns, goes on to the bit, and leaves an adapter for the plain base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.ranks import on_ranks
from tests.recipes.launching import recipe
from tests.recipes.test_adapters import TEXT, command, logits, metrics, plain_peft, train
from toolkit.adapters import load_adapted, read_adapter
from toolkit.predict import Classifier, find_model

LEARN = ["--train.steps", "60", "--optim.lr", "2e-2", "--adapter.rank", "4", "--run.eval_every", "20"]


@pytest.mark.parametrize(
    ("quantization", "ranks", "more"),
    [
        ("nf4", 2, ["--strategy.name", "fsdp", "--precision", "bf16"]),
        *(
            pytest.param(quantization, ranks, more, marks=pytest.mark.slow)
            for quantization, ranks, more in (
                ("nf4", 1, []),
                ("nf4", 1, ["--adapter.name", "loftq"]),
                ("int8", 2, ["--precision", "bf16"]),
                ("fp4-double", 2, ["--strategy.name", "zero3", "--adapter.name", "rslora"]),
                ("nf4-double", 2, ["--strategy.name", "zero2", "--adapter.name", "dora", "--precision", "bf16"]),
                ("nf4", 1, ["--precision", "fp16"]),
            )
        ),
    ],
)
def test_from_training_to_a_merged_model(
    quantization: str,
    ranks: int,
    more: list[str],
    adapter_job: list[str],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*adapter_job, *LEARN, "--quantization", quantization, *more, "--run.dir", "run"]
    shown = train(ranks, options, tmp_path)
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    said = " ".join(shown.split())
    assert f"{quantization} in 13 layers (2 × query, 2 × key, 2 × value, 7 × dense)" in said
    assert "MiB: " in said
    assert "LayerNorm" in said.partition("plain (")[2]
    report = json.loads((run / "report.json").read_text())
    assert report["test"]["accuracy"] > report["majority"] + 0.3

    # A checkpoint holds what is trained alone, and the adapter is for the plain base.
    held = load_file(next((run / "checkpoints").glob("step_*/shard_00001.safetensors")))
    assert held
    assert all("lora_" in name or "classifier" in name for name in held)
    assert read_adapter(model).quantization == quantization
    theirs = logits(plain_peft(tiny_base, model), model)
    ours = Classifier(find_model(run)).predict([TEXT])[0]
    assert list(ours.scores.values()) == pytest.approx(
        theirs.softmax(-1).sort(descending=True)[0][0].tolist(), abs=1e-5
    )
    assert ours.label == "sport"

    # On the quantized base the answers are others. Merging into that changes none.
    trained = logits(load_adapted(model, quantized=True), model)
    assert (trained - theirs).abs().max() > 1e-3
    code, text = command(capsys, "merge", run, "--base", "quantized")
    assert code == 0, text
    assert f"its logits differ from those of the adapter on its base in {quantization} by at most" in text
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    assert logits(merged, run / "merged").tolist() == [pytest.approx(trained[0].tolist(), abs=1e-4)]

    # Merging into the plain base does, and says by how much.
    code, text = command(capsys, "merge", run, "--out", tmp_path / "plain")
    assert f"the adapter on its base in {quantization} by " in text
    if quantization == "int8":
        assert code == 0, text
    if code == 0:
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
        assert logits(merged, model).tolist() == [pytest.approx(theirs[0].tolist(), abs=1e-4)]
    else:
        assert "--base quantized" in text
        assert not (tmp_path / "plain").exists()


def test_a_merged_model_that_is_too_far_from_what_was_trained(
    adapter_job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(1, [*adapter_job, "--quantization", "fp4", "--train.steps", "3", "--run.dir", "run"], tmp_path)
    monkeypatch.setattr("toolkit.merge.QUANTIZED_BOUNDS", {"fp4": 1e-6})
    code, text = command(capsys, "merge", tmp_path / "run")
    assert code == 2
    assert "logits differ from those of the adapter on its base in fp4 by up to" in text
    assert not (tmp_path / "run" / "merged").exists()


@pytest.mark.parametrize(
    ("quantization", "strategy"),
    [
        ("nf4-double", "fsdp"),
        *(pytest.param(q, s, marks=pytest.mark.slow) for q, s in (("int8", "ddp"), ("nf4", "zero3"))),
    ],
)
def test_a_run_goes_on_to_the_bit(quantization: str, strategy: str, adapter_job: list[str], tmp_path: Path) -> None:
    options = [*adapter_job, "--quantization", quantization, "--adapter.rank", "4", "--strategy.name", strategy]
    options += ["--optim.schedule", "constant", "--optim.warmup_steps", "0", "--checkpoint.allow_change", "train.steps"]
    train(2, [*options, "--train.steps", "9", "--run.dir", "whole"], tmp_path)
    train(2, [*options, "--train.steps", "4", "--run.dir", "parts"], tmp_path)
    train(2, [*options, "--train.steps", "9", "--run.dir", "parts"], tmp_path)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    files = [tmp_path / run / "model" / "adapter_model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()

    # In other bits it is another run.
    options = [*options, "--train.steps", "10", "--quantization", "fp4", "--run.dir", "parts"]
    code, text = on_ranks(recipe, 2, options, str(tmp_path))[0]
    assert code == 2
    assert "quantization" in text


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (1, ["--quantization", "nf4", "--adapter.name", "none"], "low-bit weights are frozen"),
        (1, ["--quantization", "int8", "--adapter.name", "pissa"], "begins with the singular values of a weight"),
        (2, ["--quantization", "int8", "--strategy.name", "fsdp"], "FSDP2 puts parameters of its own"),
        (2, ["--quantization", "int8", "--strategy.name", "zero3"], "every process would keep them whole"),
        (1, ["--quantization", "nf5"], "nf5"),
    ],
)
def test_what_is_refused(ranks: int, options: list[str], message: str, adapter_job: list[str], tmp_path: Path) -> None:
    # Before anything is loaded: there is no such model.
    arguments = [*adapter_job, *options, "--model.name", "./nowhere", "--run.dir", "run"]
    code, text = on_ranks(recipe, ranks, arguments, str(tmp_path))[0]
    assert code == 2
    assert message in " ".join(text.replace("│", " ").split())
    assert "nowhere" not in text
    assert not (tmp_path / "run").exists()
