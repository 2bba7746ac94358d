"""What bad input gets: one screen that names the fault and the remedy, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.ranks import on_ranks
from tests.recipes.launching import launch, recipe


def refused(argv: list[str], cwd: Path, ranks: int = 1, environment: dict[str, str] | None = None) -> str:
    """Run the recipe, which must refuse; its message, with all white space and frames as single spaces."""
    before = sorted(cwd.rglob("*"))
    code, text = on_ranks(in_environment, ranks, argv, str(cwd), environment or {})[0]
    assert code == 2, text
    assert "Traceback" not in text
    assert len(text.splitlines()) < 40
    assert sorted(cwd.rglob("*")) == before, "something was written"
    return " ".join(text.translate(str.maketrans("│╭╮╰╯─", "      ")).split())


def in_environment(argv: list[str], cwd: str, environment: dict[str, str]) -> tuple[int, str]:
    os.environ.update(environment)
    return recipe(argv, cwd)


def option(job: list[str], name: str, value: str) -> list[str]:
    """`job` with one option replaced."""
    index = job.index(name)
    return [*job[: index + 1], value, *job[index + 2 :]]


def lines(*texts: str) -> str:
    return "text,label\n" + "".join(f"{text}\n" for text in texts)


GOOD = [f"word{i} and more,{'ab'[i % 2]}" for i in range(60)]

DATA = {
    "missing file": (None, ["texts.csv", "no file or folder"]),
    "missing column": ("body,label\nx,a\n", ["text", "body", "--data.text"]),
    "empty data": ("text,label\n", ["texts.csv", "no rows"]),
    "one class only": (lines(*(f"word{i},a" for i in range(50))), ["1 class: 'a'"]),
    "null texts": (lines(*GOOD, *(",a" for _ in range(10))), ["10", "5"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, tiny_job: list[str], tmp_path: Path) -> None:
    content, expected = DATA[name]
    if content is not None:
        (tmp_path / "texts.csv").write_text(content)
    text = refused(option(tiny_job, "--data.name", "./texts.csv"), tmp_path)
    for word in expected:
        assert word in text
    assert "→" in text


def test_a_label_that_training_lacks(tiny_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(lines(*GOOD))
    (tmp_path / "check.csv").write_text(lines("something else,c", "and more,a"))
    job = [*option(tiny_job, "--data.name", "./train.csv"), "--data.validation", "check.csv"]
    text = refused(job, tmp_path)
    assert "'c'" in text
    assert "validation" in text


def test_a_file_that_is_not_utf8(tiny_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_bytes(lines(*GOOD).encode() + "naïve,a\n".encode("latin-1"))
    text = refused(option(tiny_job, "--data.name", "./texts.csv"), tmp_path)
    assert "UTF-8" in text
    assert "62" in text


def test_few_null_texts_are_dropped_with_a_warning(tiny_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text(lines(*GOOD, ",a", "  ,b"))
    job = [*option(tiny_job, "--data.name", "./texts.csv"), "--train.steps", "1"]
    code, text = on_ranks(recipe, 1, job, str(tmp_path))[0]
    assert code == 0, text
    assert "warning: 2 rows without a text were dropped" in text


def test_hub_names_without_a_network(tiny_job: list[str], tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    text = refused(option(tiny_job, "--data.name", "owner/some-texts"), tmp_path, environment=offline)
    assert "owner/some-texts" in text
    assert "folder" in text
    assert "sample:bbc-news" in text
    text = refused(option(tiny_job, "--model.name", "owner/some-model"), tmp_path, environment=offline)
    assert "owner/some-model" in text
    assert "folder" in text
    assert "sample:minilm" in text


SETTINGS = {
    "misspelt key": (["--optim.lrr", "1"], ["--optim.lr"]),
    "wrong type": (["--train.steps", "many"], ["--train.steps"]),
    "out of range": (["--optim.lr", "-1"], ["optim.lr", "greater than 0"]),
    "micro-batch does not divide": (
        ["--train.micro_batch", "5"],
        ["--train.global_batch 12", "micro_batch 5", "1, 2, 3"],
    ),
    "fsdp alone": (["--strategy.name", "fsdp"], ["fsdp", "one process", "accelerate launch"]),
    "zero alone": (["--strategy.name", "zero1"], ["zero1", "one process"]),
    "ddp alone": (["--strategy.name", "ddp"], ["ddp", "one process"]),
    "option of another strategy": (["--strategy.shard_size", "2"], ["--strategy.shard_size", "single"]),
    "unknown tracker": (["--run.trackers", "tensorbord"], ["tensorbord", "tensorboard"]),
    "name beside dir": (["--run.name", "x", "--run.dir", "y"], ["--run.name", "--run.dir"]),
    "decay without wsd": (["--optim.decay_share", "0.5"], ["--optim.decay_share", "linear"]),
    "warm-up too long": (["--optim.warmup_steps", "100"], ["100", "9 steps"]),
    "evaluation never due": (["--run.eval_every", "10"], ["--run.eval_every 10", "9 steps"]),
    "patience never at an end": (["--run.early_stopping", "2"], ["--run.early_stopping 2", "2 evaluations"]),
    "freeze nothing there": (["--model.freeze", "nothing_like_this"], ["nothing_like_this", "embeddings"]),
    "freeze all": (["--model.freeze", "."], ["--model.freeze", "nothing to train"]),
    "missing config file": (["--config", "missing.yaml"], ["missing.yaml"]),
    "missing model folder": (["--model.name", "./missing"], ["./missing"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, tiny_job: list[str], tmp_path: Path) -> None:
    options, expected = SETTINGS[name]
    text = refused([*tiny_job, *options], tmp_path)
    for word in expected:
        assert word in text


def test_a_global_batch_that_the_ranks_do_not_divide(tiny_job: list[str], tmp_path: Path) -> None:
    text = refused(option(tiny_job, "--train.global_batch", "13"), tmp_path, ranks=2)
    for word in ("--train.global_batch 13", "2 ranks", "12 or 14"):
        assert word in text


def test_single_on_two_processes(tiny_job: list[str], tmp_path: Path) -> None:
    assert "2 separate models" in refused([*tiny_job, "--strategy.name", "single"], tmp_path, ranks=2)


def test_a_block_that_the_model_lacks(tiny_job: list[str], tmp_path: Path) -> None:
    """Found only when the model is laid over the ranks, and still before the run's folder exists."""
    job = [*tiny_job, "--strategy.name", "fsdp", "--strategy.wrap", "LlamaDecoderLayer"]
    text = refused(job, tmp_path, ranks=2)
    assert "LlamaDecoderLayer" in text
    assert "BertLayer" in text


def test_a_deepspeed_file_that_contradicts(tiny_job: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    job = [*tiny_job, "--strategy.name", "zero2", "--strategy.deepspeed", "ds.json"]
    file.write_text(json.dumps({"gradient_accumulation_steps": 4}))
    text = refused(job, tmp_path, ranks=2)
    assert "'gradient_accumulation_steps': 4" in text
    assert "the recipe's 1" in text
    file.write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    assert "Did you mean 'zero_optimization'?" in refused(job, tmp_path, ranks=2)


def test_an_incomplete_environment(tiny_job: list[str], tmp_path: Path) -> None:
    text = refused(tiny_job, tmp_path, environment={"WORLD_SIZE": "2", "RANK": "0"})
    assert "LOCAL_RANK" in text
    assert "MASTER_ADDR" in text


def test_a_folder_that_holds_another_run(tiny_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert "run holds other files, and no run" in refused([*tiny_job, "--run.dir", "run"], tmp_path)


def test_debug_shows_the_traceback(tiny_job: list[str], tmp_path: Path) -> None:
    from tests.ranks import RankFailed

    with pytest.raises(RankFailed, match="ConfigError: strategy fsdp has no effect on one process"):
        on_ranks(recipe, 1, [*tiny_job, "--strategy.name", "fsdp", "--run.debug", "True"], str(tmp_path))


def test_two_cpu_processes_that_are_one(tiny_job: list[str], tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process: it must not train alone in silence."""
    done = launch(tiny_job, config="cpu1", launcher=["--num_processes", "2"], cwd=tmp_path)
    assert done.returncode != 0
    text = " ".join(done.stdout.split())
    assert "several processes were asked for and one was started" in text
    assert "configs/accelerate/cpu2.yaml" in text
    assert not list(tmp_path.iterdir())


def test_an_error_on_two_ranks_ends_both(tiny_job: list[str], tmp_path: Path) -> None:
    done = launch([*tiny_job, "--strategy.shard_size", "2"], config="cpu2", cwd=tmp_path)
    assert done.returncode != 0
    assert "--strategy.shard_size has no effect under strategy ddp" in " ".join(done.stdout.split())
    # The launcher shows a traceback of its own; ours is not among it.
    assert "toolkit/session.py" not in done.stdout
