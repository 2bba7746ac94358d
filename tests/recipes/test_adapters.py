"""A run with an adapter: it learns, goes on, and leaves a folder that this toolkit and plain PEFT answer alike from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.ranks import on_ranks
from tests.recipes.launching import recipe
from toolkit.cli import main
from toolkit.errors import ModelError
from toolkit.predict import Classifier, find_model

TEXT = "the striker and the keeper said this match was a big final"
LEARN = ["--train.steps", "60", "--optim.lr", "2e-2", "--adapter.rank", "4", "--run.eval_every", "60"]


def train(ranks: int, options: list[str], cwd: Path) -> str:
    code, text = on_ranks(recipe, ranks, options, str(cwd))[0]
    assert code == 0, text
    return str(text)


def plain_peft(base: Path, folder: Path) -> Any:
    """As someone loads it who has never heard of this toolkit."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt", return_token_type_ids=False)
    answer: torch.Tensor = model(**inputs).logits
    return answer


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("lora", 1, []),
        ("lora", 2, ["--strategy.name", "fsdp"]),
        *(
            pytest.param(name, ranks, more, marks=pytest.mark.slow)
            for name, ranks, more in (
                ("lora", 2, ["--strategy.name", "zero3"]),
                ("rslora", 2, ["--precision", "bf16"]),
                ("dora", 2, []),
                ("pissa", 1, []),
                ("pissa", 2, ["--strategy.name", "zero2", "--precision", "bf16"]),
                ("ia3", 1, ["--adapter.train", "LayerNorm", "word_embeddings"]),
            )
        ),
    ],
)
def test_from_training_to_a_merged_model(
    name: str,
    ranks: int,
    more: list[str],
    adapter_job: list[str],
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn = [word for word in LEARN if name != "ia3" or word not in ("--adapter.rank", "4")]
    options = [*adapter_job, *learn, *more, "--adapter.name", name, "--run.dir", "run"]
    shown = train(ranks, options, tmp_path)
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    assert f"{name} " in shown
    assert "classifier" in shown.partition("whole:")[2]
    report = json.loads((run / "report.json").read_text())
    assert report["test"]["accuracy"] > report["majority"] + 0.3
    assert report["test"]["loss"] < report["before"]["loss"]

    # What is left: an adapter and no base.
    assert {path.name for path in model.glob("*.safetensors")} == {"adapter_model.safetensors"}
    held = load_file(next((run / "checkpoints").glob("step_*/shard_00001.safetensors")))
    assert not any("position_embeddings" in tensor for tensor in held)

    # Plain PEFT, this toolkit, and the two merged give one answer.
    theirs = logits(plain_peft(tiny_base, model), model)
    ours = Classifier(find_model(run)).predict([TEXT])[0]
    assert list(ours.scores.values()) == pytest.approx(
        theirs.softmax(-1).sort(descending=True)[0][0].tolist(), abs=1e-5
    )
    assert ours.label == "sport"
    assert command(capsys, "predict", run, TEXT)[1].count("sport") == 1
    code, text = command(capsys, "merge", run)
    assert code == 0
    assert "its logits differ" in text
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    assert merged.config.id2label == {0: "money", 1: "music", 2: "sport"}
    assert logits(merged, run / "merged").tolist() == [pytest.approx(theirs[0].tolist(), abs=1e-4)]
    assert command(capsys, "predict", run / "merged", TEXT)[0] == 0

    # An export from a checkpoint is the same folder, but for the card, whose figures are those of the run's end.
    code, text = command(capsys, "checkpoint", "export", run, tmp_path / "exported", "--max-shard-size", "1GB")
    assert code == 2
    assert "--max-shard-size has no effect on an adapter" in text
    assert command(capsys, "checkpoint", "export", run, tmp_path / "exported")[0] == 0
    names = sorted(path.name for path in model.iterdir() if path.name != "README.md")
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == names
    for file in names:
        assert (tmp_path / "exported" / file).read_bytes() == (model / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_merging_into_fewer_bits(
    dtype: str, adapter_job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(1, [*adapter_job, "--train.steps", "3", "--run.dir", "run"], tmp_path)
    assert command(capsys, "merge", tmp_path / "run", "--out", tmp_path / "half", "--dtype", dtype)[0] == 0
    kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {{"fp16": "torch.float16", "bf16": "torch.bfloat16"}[dtype]}
    code, text = command(capsys, "merge", tmp_path / "half")
    assert code == 2
    assert "is a whole model, with no adapter to merge" in text
    code, text = command(capsys, "merge", tmp_path / "run", "--out", tmp_path / "half")
    assert code == 2
    assert "there already" in text


def test_a_merged_model_that_would_answer_otherwise(
    adapter_job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(1, [*adapter_job, "--train.steps", "3", "--run.dir", "run"], tmp_path)
    monkeypatch.setattr("toolkit.merge.BOUNDS", {"bf16": 1e-7})
    code, text = command(capsys, "merge", tmp_path / "run", "--dtype", "bf16")
    assert code == 2
    assert "merged in bf16, the model answers otherwise" in text
    assert not (tmp_path / "run" / "merged").exists()


def test_several_adapters_on_one_base(
    adapter_job: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(1, [*adapter_job, "--train.steps", "3", "--optim.lr", "1e-2", "--run.dir", "one"], tmp_path)
    more = ["--run.seed", "7", "--adapter.rank", "2", "--adapter.targets", "query", "--run.dir", "two"]
    train(1, [*adapter_job, "--train.steps", "3", "--optim.lr", "1e-2", *more], tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    weights = (0.75, 0.25)
    options = ["--weights", *weights, "--out", tmp_path / "both"]
    code, text = command(capsys, "merge", one, two, *options)
    assert code == 0, text
    assert "its logits differ from those of the sum of the adapters by at most" in text
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "both").state_dict()
    apart = [plain_peft(tiny_base, run / "model").merge_and_unload().state_dict() for run in (one, two)]
    moved = 0
    for name, tensor in found.items():
        expected = weights[0] * apart[0][name] + weights[1] * apart[1][name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
        moved += not torch.equal(apart[0][name], apart[1][name])
    assert moved > 2
    assert command(capsys, "predict", tmp_path / "both", TEXT)[0] == 0

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    other_weights(other)
    train(1, [*adapter_job, "--train.steps", "1", "--model.name", str(other), "--run.dir", "three"], tmp_path)
    for words, message in (
        ([one, two], "2 adapters need --weights, a number for each of them"),
        ([one, two, "--weights", "1"], "2 adapters need --weights"),
        ([one, two, "--weights", "1", "1", "--out", "x"], "--weights come to 2, and classifier"),
        ([one, two, "--weights", "0.5", "0.5"], "several adapters need --out"),
        ([one, two, "--weights", "0.5", "0.5", "--out", "x", "--base", "quantized"], "--base quantized is for one"),
        ([one, tmp_path / "three", "--weights", "0.5", "0.5", "--out", "x"], "were trained on other bases"),
        ([one, "--weights", "0.5", "--out", "x"], "--weights has no effect on one adapter"),
    ):
        code, text = command(capsys, "merge", *words)
        assert code == 2, words
        assert message in text
    config = json.loads((two / "model" / "config.json").read_text())
    config["id2label"] = {"0": "cheese", "1": "music", "2": "sport"}
    (two / "model" / "config.json").write_text(json.dumps(config))
    code, text = command(capsys, "merge", one, two, "--weights", "0.5", "0.5", "--out", "x")
    assert (code, "the adapters know other classes" in text) == (2, True)


def other_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr", "samples_seen")} for line in lines]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("lora", "ddp"), *(pytest.param("pissa", s, marks=pytest.mark.slow) for s in ("fsdp", "zero2"))],
)
def test_a_run_goes_on_to_the_bit_and_on_its_own_base_only(
    name: str, strategy: str, adapter_job: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    options = [*adapter_job, "--adapter.name", name, "--adapter.rank", "4", "--strategy.name", strategy]
    options += ["--optim.schedule", "constant", "--optim.warmup_steps", "0", "--checkpoint.allow_change", "train.steps"]
    train(2, [*options, "--train.steps", "9", "--run.dir", "whole"], tmp_path)
    train(2, [*options, "--train.steps", "4", "--run.dir", "parts"], tmp_path)
    shutil.copytree(tmp_path / "parts", tmp_path / "elsewhere")
    train(2, [*options, "--train.steps", "9", "--run.dir", "parts"], tmp_path)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    files = [tmp_path / run / "model" / "adapter_model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()

    other_weights(tiny_base)
    code, text = on_ranks(recipe, 2, [*options, "--train.steps", "9", "--run.dir", "elsewhere"], str(tmp_path))[0]
    assert code == 2
    assert "other frozen weights" in " ".join(text.replace("│", " ").split())
    with pytest.raises(ModelError, match="is not the model that the adapter in"):
        Classifier(find_model(tmp_path / "whole"))
    shutil.rmtree(tiny_base)
    with pytest.raises(ModelError, match="there is no such folder"):
        Classifier(find_model(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter.rank", "4", "--adapter.name", "none"], "--adapter.rank has no effect with --adapter.name none"),
        (["--model.freeze", "embeddings"], "--model.freeze has no effect with --adapter.name lora"),
        (["--checkpoint.max_shard_size", "1GB"], "--checkpoint.max_shard_size has no effect on an adapter"),
        (["--model.init", "random"], "would freeze random weights, as those of --model.init random are"),
        (["--adapter.targets", "quary"], "'quary' matches no linear layer. Did you mean 'query'?"),
    ],
)
def test_what_is_refused(options: list[str], message: str, adapter_job: list[str], tmp_path: Path) -> None:
    code, text = on_ranks(recipe, 1, [*adapter_job, *options, "--run.dir", "run"], str(tmp_path))[0]
    assert code == 2
    assert message in " ".join(text.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy(adapter_job: list[str], tmp_path: Path) -> None:
    options = [*adapter_job, "--adapter.name", "dora", "--adapter.rank", "4", "--adapter.lr_ratio", "4"]
    options += ["--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    options += ["--checkpoint.allow_change", "train.steps", "strategy.name"]
    train(1, [*options, "--train.steps", "9", "--run.dir", "whole"], tmp_path)
    stages = [("fsdp", 2, 2), ("zero3", 2, 4), ("single", 1, 6), ("zero1", 2, 8), ("ddp", 2, 9)]
    for strategy, ranks, steps in stages:
        asked = ["--strategy.name", strategy, "--train.steps", str(steps), "--run.dir", "parts"]
        train(ranks, [*options, *asked], tmp_path)
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
