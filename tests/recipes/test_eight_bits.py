"""Products in fp8 and moments in 8 bits, in a whole run: what the plan says, going on to the bit, what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.recipes.launching import learn, read

train = functools.partial(learn, "pretrain_lm")
STEPS = 8


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    lines = [
        json.dumps({"text": f"No. {n}: the {('bank', 'team')[n % 2]} {('won', 'lost')[n % 3 % 2]}."}) for n in range(90)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [
        *("--model.layers", "2", "--model.hidden_size", "64", "--model.heads", "4", "--model.kv_heads", "2"),
        *("--data.name", str(tmp_path / "texts.jsonl"), "--data.max_length", "64", "--tokenizer.vocabulary", "300"),
        *("--train.global_batch", "4", "--optim.schedule", "constant", "--optim.warmup_steps", "0"),
        *("--optim.final_share", "None", "--optim.lr", "4e-3", "--generate.prompts"),
        *("--checkpoint.allow_change", "train.steps", "--precision", "fp32", "--optim.name", "adamw-8bit"),
    ]


def in_fp8() -> list[str]:
    pytest.importorskip("torchao", reason="needs torchao, with which every start takes longer")
    return ["--precision", "fp8"]


@pytest.mark.parametrize("strategy", ["single", "fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_moments_go_on_to_the_bit(strategy: str, job: list[str], tmp_path: Path) -> None:
    shown = check_going_on([*job, "--strategy.name", strategy], 1 if strategy == "single" else 2, tmp_path)
    for said in ("adamw-8bit (", "LowBitAdamW"):
        assert said in shown
    effective = json.loads((tmp_path / "whole" / "manifest.json").read_text(encoding="utf-8"))["effective"]
    assert set(effective["moment_bits"]) == {8, 32}


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero2"])
def test_products_go_on_to_the_bit(strategy: str, job: list[str], tmp_path: Path) -> None:
    options = [*job, *in_fp8(), "--strategy.name", strategy]
    shown = check_going_on(options, 1 if strategy == "single" else 2, tmp_path)
    for said in ("fp8 (as asked)", "products of 14 linear layers", "emulated"):
        assert said in shown
    assert "torchao" not in shown


def check_going_on(options: list[str], ranks: int, tmp_path: Path) -> str:
    shown = train(ranks, [*options, "--train.steps", str(STEPS), "--run.dir", "whole"], tmp_path)
    train(ranks, [*options, "--train.steps", "3", "--run.dir", "parts"], tmp_path)
    train(ranks, [*options, "--train.steps", str(STEPS), "--run.dir", "parts"], tmp_path)
    (whole, report), (parts, its_report) = read(tmp_path / "whole"), read(tmp_path / "parts")
    for figure in ("loss", "grad_norm"):
        assert [line[figure] for line in parts] == [line[figure] for line in whole]
    assert its_report["test"] == report["test"]
    assert report["test"]["perplexity"] < report["before"]["perplexity"] / 2
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    return shown


def test_it_goes_on_with_another_optimizer(job: list[str], tmp_path: Path) -> None:
    change = ["--checkpoint.allow_change", "train.steps", "optim.name"]
    train(1, [*job, "--train.steps", "4", "--run.dir", "run"], tmp_path)
    train(1, [*job, "--train.steps", "8", "--run.dir", "run", *change, "--optim.name", "adamw"], tmp_path)
    losses = [line["loss"] for line in read(tmp_path / "run")[0]]
    assert len(losses) == 8
    assert max(losses[4:]) < losses[0]


@pytest.mark.parametrize(
    ("ranks", "options", "said"),
    [
        (2, ["--precision", "fp8", "--strategy.name", "zero3"], "--precision fp8 with zero3 is refused"),
        (2, ["--strategy.name", "diloco"], "DiLoCo averages the moments"),
        (1, ["--optim.name", "paged-adamw-8bit"], "has no effect on cpu ranks"),
        (1, ["--train.activation_checkpointing", "offload"], "has no effect on CPU ranks"),
    ],
)
def test_what_is_refused(ranks: int, options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    shown = train(ranks, [*job, *options, "--run.dir", "run"], tmp_path, 2)
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_sides_that_hardware_does_not_multiply(job: list[str], tmp_path: Path) -> None:
    shown = train(1, [*job, *in_fp8(), "--model.hidden_size", "72", "--run.dir", "run"], tmp_path, 2)
    assert "have no linear layers that are trained and whose sides are multiples of 16" in shown
