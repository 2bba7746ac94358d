"""Speech: the same numbers everywhere, each recording transcribed once, bad ones named, answers to files."""

from __future__ import annotations

import functools
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from tests.recipes.conftest import Learnt
from tests.recipes.launching import ROOT, assert_same_curve, launch, learn, read
from tests.speech import save_recordings, save_speech_model, say
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit
from toolkit.config import from_yaml

STEPS = 6


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and recordings."""
    folder = tmp_path_factory.mktemp("speech")
    save_speech_model(folder / "model")
    save_recordings(folder)
    return folder


@pytest.fixture
def job(there: Path) -> list[str]:
    return [
        *("--model.name", str(there / "model"), "--data.name", str(there / "clips.jsonl")),
        *("--data.max_seconds", "1", "--data.validation_share", "0.1", "--data.test_share", "0.2"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32"),
        *("--train.eval_batch", "4", "--run.dir", "run"),
    ]


train = functools.partial(learn, "speech")


KINDS = {
    "whole": ("--model.freeze", r"^model\.encoder\.conv"),
    "lora": ("--adapter.name", "lora", "--adapter.rank", "4"),
}


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("whole", "ddp"),
        ("whole", "fsdp"),
        pytest.param("whole", "zero3", marks=pytest.mark.slow),
        pytest.param("lora", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_the_same_numbers_everywhere(
    kind: str,
    strategy: str,
    job: list[str],
    tmp_path: Path,
    alone: Callable[..., Learnt],
) -> None:
    """The loss, the norm of the gradient, and what is written of each recording of the test split."""
    options = [*job, *KINDS[kind]]
    expected, expected_report = alone("speech", *options)
    train(2, [*options, "--train.micro_batch", "2", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    for when in ("before", "test"):
        assert report[when]["loss"] == pytest.approx(expected_report[when]["loss"], rel=1e-5)
        for figure in ("units", "wer", "cer", "transcripts"):
            assert report[when][figure] == expected_report[when][figure], figure
        assert [line["id"] for line in report[when]["transcripts"]] == list(range(8))
    assert report["test"]["loss"] < report["before"]["loss"]
    assert account(tmp_path / "run").sound
    clip = Path(job[job.index("--data.name") + 1]).parent / "clips" / "0.wav"
    assert toolkit(["predict", str(tmp_path / "run"), str(clip)]) == 0  # an adapter on the window of the run, too


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    job: list[str], tmp_path: Path, alone: Callable[..., Learnt]
) -> None:
    """What is blanked out is a function of the epoch: it is the same after a resume, in the second epoch too."""
    options = [*job, *KINDS["whole"]]
    expected, expected_report = alone("speech", *options)
    assert expected[-1]["epoch"] == 1
    train(1, [*options, "--train.steps", "5"], tmp_path)
    train(1, [*options, "--checkpoint.allow_change", "train.steps"], tmp_path)
    metrics, report = read(tmp_path / "run")
    for figure in ("loss", "grad_norm", "units"):
        assert [line[figure] for line in metrics] == [line[figure] for line in expected]
    assert report["test"] == expected_report["test"]
    assert report["before"] == expected_report["before"]


def test_launch_what_is_shown_and_the_answers_to_files(
    job: list[str], there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through `accelerate launch` on two processes in bf16; the saved model and the exported one answer alike."""
    options = [*job, "--train.micro_batch", "2", "--precision", "bf16"]
    done = launch(options, config="cpu2", cwd=tmp_path, name="speech")
    assert done.returncode == 0, done.stdout
    shown = " ".join(done.stdout.replace("│", " ").split())
    for said in ("word error rate", "character error rate", "min train", "window 1 seconds", "said:", "before:"):
        assert said in shown
    assert "toolkit predict run CLIP.wav" in shown
    run = tmp_path / "run"
    _, report = read(run)
    assert report["test"]["units"] > 0
    assert "Word error rate" in (run / "report.html").read_text()
    assert "Word error rate" in (run / "model" / "README.md").read_text()

    model, processor = (kind.from_pretrained(run / "model") for kind in (AutoModelForSpeechSeq2Seq, AutoProcessor))
    assert (model.config.max_source_positions, processor.feature_extractor.chunk_length) == (50, 1)
    assert model.generation_config.suppress_tokens == [5]
    assert toolkit(["checkpoint", "export", str(run), str(tmp_path / "exported")]) == 0
    capsys.readouterr()
    say(["low", "high"] * 6, tmp_path / "long.wav", rate=8000)
    files = [str(there / "clips" / "0.wav"), str(tmp_path / "long.wav")]
    answers = []
    for place in (run, tmp_path / "exported"):
        assert toolkit(["predict", str(place), *files, "--json"]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [answer["file"] for answer in answers[0]] == files
    assert all(isinstance(answer["text"], str) for answer in answers[0])
    assert answers[0] == answers[1]


def test_a_folder_of_recordings_with_their_texts(job: list[str], there: Path, tmp_path: Path) -> None:
    """Is the same data as the table of them, under other names, and what is there twice is dropped."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for line in (there / "clips.jsonl").read_text().splitlines():
        row = json.loads(line)
        name = Path(row["audio"])
        shutil.copy(there / name, pairs / f"clip {name.name}")
        (pairs / f"clip {name.stem}.txt").write_text(f"{row['text']}\n")
    shutil.copy(pairs / "clip 0.wav", pairs / "again.wav")
    shutil.copy(pairs / "clip 0.txt", pairs / "again.txt")
    shown = train(
        1, [*job, "--data.name", str(pairs), "--train.steps", "1", "--checkpoint.save_model", "False"], tmp_path
    )
    assert "1 repeated" in shown
    _, report = read(tmp_path / "run")
    assert sum(report["data"]["samples"].values()) == 48


def test_bad_recordings_are_named(job: list[str], there: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").symlink_to(there / "clips")
    say(["low"] * 6, tmp_path / "long.wav")
    (tmp_path / "noise.wav").write_bytes(b"no recording")
    rows = [json.loads(line) for line in (there / "clips.jsonl").read_text().splitlines()]
    bad = [
        {"audio": "nowhere.wav", "text": uuid.uuid4().hex},  # that no cache knows these rows
        {"audio": "long.wav", "text": "Low."},
        {"audio": "noise.wav", "text": "Low."},
        {"audio": "clips/0.wav", "text": " … "},
        {"text": "Low."},
        {"audio": "clips/0.wav", "text": "Something else."},
    ]
    file = tmp_path / "clips.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    options = [*job, "--data.name", str(file), "--train.steps", "1"]
    shown = train(1, [*options, "--data.max_bad_rows", "5"], tmp_path, code=2)
    assert "Traceback" not in shown
    for number, said in (
        (49, "the recording that they name is not there"),
        (50, "their recording is longer than --data.max_seconds 1"),
        (51, "their recording cannot be read"),
        (52, "their column 'text' has no words"),
        (53, "their column 'audio' names no file"),
    ):
        where = f"row {number} of {file}, because {said}"
        assert where.replace(" ", "") in shown.replace(" ", ""), said
    assert not (tmp_path / "run").exists()

    shown = train(1, [*options, "--data.max_bad_rows", "6", "--checkpoint.save_model", "False"], tmp_path)
    assert "6 malformed rows are left out" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.max_seconds", "3"], "the model hears 2 seconds at a time"),
        (["--data.language", "zh"], "--data.language has no effect"),
        (["--model.name", "sample:minilm"], "no tokenizer and feature extractor of speech could be loaded"),
        (["--data.name", "sample:whisper-tiny-en"], "is a model, not data"),
        (["--run.show", "1"], "--run.show has no effect"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    shown = train(1, [*job, *options], tmp_path, code=2)
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_every_configuration_is_valid() -> None:
    from recipes.speech import Config

    files = sorted((ROOT / "configs" / "speech").glob("*.yaml"))
    assert files
    for file in files:
        from_yaml(Config, file)
        header = file.read_text().split("\n\n")[0]
        assert f"--config configs/speech/{file.name}" in header
        assert "Hardware:" in header
        assert "Result:" in header
