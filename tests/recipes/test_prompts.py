"""A run with virtual tokens: what it leaves answers alike from plain PEFT, and cannot be merged."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chats import save_chat_model, write_chats
from tests.recipes.launching import learn
from tests.recipes.test_adapters import TEXT, command, logits, metrics, plain_peft, train
from toolkit.adapters import in_place, load_adapted
from toolkit.predict import Classifier, find_model

VIRTUAL = ("--adapter.virtual_tokens", "6")


def test_a_classifier(
    adapter_job: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = ["--train.steps", "40", "--optim.lr", "3e-2", "--run.eval_every", "40", "--run.dir", "run"]
    options = [*adapter_job, *learn, "--adapter.name", "prompt", *VIRTUAL, "--strategy.name", "fsdp"]
    shown = train(2, options, tmp_path)
    run, model = tmp_path / "run", tmp_path / "run" / "model"
    assert "prompt of 6 virtual tokens; whole: classifier" in " ".join(shown.split())
    report = json.loads((run / "report.json").read_text())
    assert report["test"]["accuracy"] > report["majority"] + 0.3

    held = load_file(next((run / "checkpoints").glob("step_*/shard_00001.safetensors")))
    assert all("prompt_encoder" in name or "classifier" in name for name in held)
    assert load_file(model / "adapter_model.safetensors")["prompt_embeddings"].shape == (6, 32)
    theirs = logits(plain_peft(tiny_base, model), model)
    ours = Classifier(find_model(run)).predict([TEXT])[0]
    assert list(ours.scores.values()) == pytest.approx(
        theirs.softmax(-1).sort(descending=True)[0][0].tolist(), abs=1e-5
    )
    code, text = command(capsys, "merge", run)
    assert code == 2
    assert "virtual tokens stand in front of a text" in text
    assert not (run / "merged").exists()
    assert command(capsys, "checkpoint", "export", run, tmp_path / "exported")[0] == 0
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (model, tmp_path / "exported")]
    assert weights[0] == weights[1]


@pytest.fixture
def chats(tmp_path: Path) -> list[str]:
    """Options of a run of `sft`."""
    return [
        *("--model.name", str(save_chat_model(tmp_path / "model"))),
        *("--data.name", str(write_chats(tmp_path / "chats.jsonl")), "--data.max_length", "128"),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1"),
        *("--train.global_batch", "8", "--train.steps", "12", "--optim.lr", "1e-1", "--precision", "fp32"),
        *("--generate.tokens", "4", "--generate.prompts", "Who sings?", "--run.dir", "run", "--run.log_every", "1"),
    ]


learn_to_answer = functools.partial(learn, "sft")


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("prompt", 1, []),
        ("prefix", 2, ["--strategy.name", "zero2"]),
        *(
            pytest.param(name, 2, ["--strategy.name", "fsdp", "--precision", "bf16"], marks=pytest.mark.slow)
            for name in ("prompt", "prefix")
        ),
    ],
)
def test_a_language_model(
    name: str, ranks: int, more: list[str], chats: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = learn_to_answer(ranks, [*chats, "--adapter.name", name, *VIRTUAL, *more], tmp_path)
    run, folder = tmp_path / "run", tmp_path / "run" / "model"
    report = json.loads((run / "report.json").read_text())
    assert f"{name} of 6 virtual tokens" in shown
    padding = report["plan"]["training"]["padding"]
    assert padding == "none" if name == "prompt" else "keys and values that no token of a text has" in padding
    assert report["plan"]["model"]["logits"] == "never whole"
    assert report["test"]["loss"] < report["before"]["loss"]

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs, ours = PeftModel.from_pretrained(base, folder).eval(), in_place(load_adapted(folder))
    text = AutoTokenizer.from_pretrained(folder)("Who sings? A bird", return_tensors="pt")
    ids, mask = text["input_ids"], text["attention_mask"]
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        assert torch.allclose(ours(input_ids=ids, attention_mask=mask).logits, expected, atol=1e-5)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        continued = [m.generate(input_ids=ids, attention_mask=mask, **options).tolist() for m in (ours, theirs)]
        assert continued[0] == continued[1]
    assert command(capsys, "predict", run, "Who sings?", "--tokens", "4")[0] == 0
    code, said = command(capsys, "predict", run, "Who sings?", "--tokens", "250")
    assert code == 2
    assert "the 250 that the model was made for" in said  # of 256


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(chats: list[str], tmp_path: Path) -> None:
    options = [*chats, "--adapter.name", "prefix", "--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    options += ["--checkpoint.allow_change", "train.steps"]
    for run, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        learn_to_answer(2, [*options, "--train.steps", str(steps), "--run.dir", run], tmp_path)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert_cls", ["--adapter.name", "prompt", "--train.compile", "True"], "--train.compile does not work with"),
        (
            "bert_cls",
            ["--adapter.name", "prefix", "--train.activation_checkpointing", "full"],
            "would find the keys and values of its first time in front",
        ),
        ("bert_cls", ["--adapter.name", "prompt", "--train.cuda_graphs", "True"], "--train.cuda_graphs does not work"),
        ("bert_cls", ["--adapter.name", "prefix", "--quantization", "nf4"], "no test covers virtual tokens"),
        ("bert_cls", ["--adapter.name", "prompt", "--adapter.rank", "4"], "--adapter.rank has no effect"),
        ("bert_cls", ["--adapter.name", "lora", *VIRTUAL], "--adapter.virtual_tokens has no effect with"),
        ("bert_cls", ["--adapter.name", "loftq"], "and nothing is rounded"),
        ("bert_cls", ["--adapter.name", "loftq", "--quantization", "int8"], "no test covers LoftQ on such a base"),
        ("dpo", ["--adapter.name", "prompt"], "virtual tokens stand that nobody has trained"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(kind: str, options: list[str], message: str, tmp_path: Path) -> None:
    arguments = [*options, "--model.name", "./nowhere", "--run.dir", "run"]
    text = learn(kind, 1, arguments, tmp_path, 2)
    assert message in text
    assert "nowhere" not in text
    assert not (tmp_path / "run").exists()
