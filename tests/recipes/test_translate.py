"""Translation: the same numbers and texts everywhere, what is learnt, asked and refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.pairs import write_pairs
from tests.recipes.launching import assert_same_curve, launch, learn, read
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit

STEPS = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def job(pairs: Path) -> list[str]:
    return [
        *("--data.name", str(pairs), "--data.validation_share", "0.1", "--data.test_share", "0.1"),
        *("--data.max_length", "16", "--data.max_target_length", "24", "--tokenizer.vocabulary", "300"),
        *("--model.layers", "2", "--model.hidden_size", "32", "--model.dropout", "0", "--train.label_smoothing", "0.1"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32", "--train.eval_batch", "5"),
        *("--generate.beams", "2", "--generate.show", "3", "--run.eval_every", "4", "--run.dir", "run"),
    ]


train = functools.partial(learn, "translate")


@pytest.fixture(scope="module")
def alone(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(1, job, folder)
    return folder / "run"


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2"))]
)
def test_the_same_numbers_and_texts_everywhere(strategy: str, job: list[str], alone: Path, tmp_path: Path) -> None:
    expected, expected_report = read(alone)
    train(2, [*job, "--train.micro_batch", "2", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    assert report["texts"] == expected_report["texts"]
    assert len(report["texts"]) == 6
    for part in ("before", "test"):
        for figure in ("bleu", "chrf", "loss"):
            assert report[part][figure] == pytest.approx(expected_report[part][figure], rel=1e-5)
    assert report["baselines"] == expected_report["baselines"]
    assert account(tmp_path / "run").sound


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], alone: Path, tmp_path: Path) -> None:
    train(1, [*job, "--train.steps", "4"], tmp_path)
    train(1, [*job, "--checkpoint.allow_change", "train.steps"], tmp_path)
    (whole, whole_report), (metrics, report) = read(alone), read(tmp_path / "run")
    for figure in ("loss", "grad_norm", "units"):
        assert [line[figure] for line in metrics] == [line[figure] for line in whole]
    assert report["before"] == whole_report["before"]
    assert report["test"] == whole_report["test"]


def test_it_learns_and_predicts_what_was_tested(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = ["--model.hidden_size", "64", "--train.global_batch", "16", "--train.micro_batch", "16"]
    longer = ["--train.steps", "200", "--run.eval_every", "200", "--optim.lr", "3e-3", "--train.label_smoothing", "0"]
    shown = train(1, [*job, *larger, *longer], tmp_path)
    _, report = read(tmp_path / "run")
    assert report["before"]["bleu"] < 5
    assert report["test"]["bleu"] > 60
    assert report["test"]["chrf"] > 60
    assert "tok:zh" in report["test"]["bleu_signature"]
    for said in ("BLEU", "chrF", "greedy, not beams", "wanted:"):
        assert said in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Written for samples of the test" in page
    assert "On the same samples" in page

    tested = [line for line in report["texts"] if line["step"] == 200]
    capsys.readouterr()
    assert toolkit(["predict", str(tmp_path / "run"), *(line["prompt"] for line in tested), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"text": line["prompt"], "written": line["text"]} for line in tested]
    assert toolkit(["predict", str(tmp_path / "run"), "the cat", "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("the cat\n")


def test_texts_there_and_back(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer of one model is the question to the other, and goes to the file where it is another text."""
    texts = ["the cat", "one and two", "the cat sees", "three"]
    (tmp_path / "texts.csv").write_text("id,said\n" + "".join(f"{at},{text}\n" for at, text in enumerate(texts)))
    command = ["data", "back-translate", str(tmp_path / "texts.csv"), str(alone), str(alone), "--text", "said"]
    assert toolkit([*command, str(tmp_path / "back.jsonl"), "--batch", "3"]) == 0
    assert "of 4 texts in other words" in capsys.readouterr().err
    found = [json.loads(line) for line in (tmp_path / "back.jsonl").read_text().splitlines()]

    def written(some: list[str]) -> list[str]:
        assert toolkit(["predict", str(alone), "--json", *some]) == 0
        return [json.loads(line)["written"] for line in capsys.readouterr().out.splitlines()]

    there = written(texts)
    back = iter(written([text for text in there if text]))
    other = [next(back) if text else "" for text in there]
    assert found == [
        {"text": text, "paraphrase": one} for text, one in zip(texts, other, strict=True) if one not in ("", text)
    ]
    assert toolkit([*command, str(tmp_path / "back.csv")]) == 0
    assert (tmp_path / "back.csv").read_text().startswith("text,paraphrase\n")
    for changed, message in (
        ([*command, str(tmp_path / "back.csv")], "back.csv is there already"),
        ([*command, str(tmp_path / "none" / "back.csv")], "lies in no folder"),
        ([*command, str(tmp_path / "back.txt")], "no type that can be written"),
        ([*command[:3], str(tmp_path / "none"), *command[4:], str(tmp_path / "b.csv")], "is not there"),
    ):
        assert toolkit(changed) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_from_there_an_adapter_goes_on(job: list[str], alone: Path, tmp_path: Path) -> None:
    """A folder with an encoder–decoder is what `--model.name` takes, with its tokenizer."""
    sizes = job.index("--model.layers")
    options = [*job[:sizes], *job[sizes + 4 :], "--model.name", str(alone / "model"), "--adapter.name", "lora"]
    vocabulary = options.index("--tokenizer.vocabulary")
    train(
        1, [*options[:vocabulary], *options[vocabulary + 2 :], "--train.steps", "2", "--run.eval_every", "2"], tmp_path
    )
    _, report = read(tmp_path / "run")
    _, before = read(alone)
    assert report["before"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-5)
    assert report["before"]["bleu"] == pytest.approx(before["test"]["bleu"])
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert toolkit(["predict", str(tmp_path / "run"), "the cat", "--tokens", "2"]) == 0


def test_two_text_files_are_the_same_as_their_rows(job: list[str], pairs: Path, alone: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    (tmp_path / "all.en").write_text("".join(f"{row['source']}\n" for row in rows), encoding="utf-8")
    (tmp_path / "all.zh").write_text("".join(f"{row['target']}\r\n" for row in rows), encoding="utf-8")
    train(1, [*job, "--data.name", "all.en,all.zh"], tmp_path)
    assert read(tmp_path / "run")[0][-1]["loss"] == read(alone)[0][-1]["loss"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.name", "a.en,a.zh"], "a.en has 3 lines and a.zh 2"),
        (["--data.name", "a.en,b.zh"], "there is no file b.zh"),
        (["--data.source", "english"], "row 1 of"),
        (["--data.source", "target"], "both name the column 'target'"),
        (["--data.target_lang", "zho_Hans"], "this tokenizer has no tokens of languages"),
        (["--generate.beams", "1", "--generate.length_penalty", "2"], "no effect on one beam"),
        (["--model.name", "sample:minilm"], "--model.layers"),
        (["--model.hidden_size", "30"], "no multiple of --model.heads"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n")
    (tmp_path / "a.zh").write_text("一\n二\n")
    text = learn("translate", 1, [*job, "--model.layers", "3", *options], tmp_path, 2)
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_launched_on_two_ranks(job: list[str], alone: Path, tmp_path: Path) -> None:
    done = launch([*job, "--train.micro_batch", "2"], config="cpu2", cwd=tmp_path, name="translate")
    assert done.returncode == 0, done.stdout
    metrics, report = read(tmp_path / "run")
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in read(alone)[0]], rel=1e-5)
    assert report["test"]["bleu"] == pytest.approx(read(alone)[1]["test"]["bleu"])
