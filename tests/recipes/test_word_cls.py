"""From a list of words to a classifier over their vectors: the matrix, both accuracies, the same numbers everywhere."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import on_ranks
from tests.recipes.conftest import COMMON, WORDS
from tests.recipes.launching import RECIPE, assert_same_curve, learn, read
from toolkit.cli import main as toolkit
from toolkit.embeddings import load_embedding
from toolkit.networks.bag_of_words import BagOfWordsConfig, BagOfWordsForSequenceClassification

STEPS = 16
CASES = [
    pytest.param(strategy, marks=() if strategy in ("ddp", "fsdp") else pytest.mark.slow)
    for strategy in ("ddp", "fsdp", "zero2", "zero3")
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of words, and vectors for them: those of a topic are near one another."""
    folder = tmp_path_factory.mktemp("words")
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(4, 16, generator=generator)
    lines, words = [], []
    for topic, of_topic in enumerate([*WORDS.values(), COMMON]):
        for word in of_topic:
            vector = middle[topic] + 0.3 * torch.randn(16, generator=generator)
            lines.append(f"{word} {' '.join(f'{value:.4f}' for value in vector.tolist())}")
            words.append(word)
    (folder / "vectors.txt").write_text("\n".join(lines[:-2]) + "\n")  # the last two have none
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    return folder


def make(there: Path, *options: str, code: int = 0) -> str:
    files = ["--vocabulary.words", str(there / "words.txt"), "--vectors.name", str(there / "vectors.txt")]
    return learn("embedding_matrix", 1, [*files, "--matrix.output", str(there / "matrix"), *options], there, code)


@pytest.fixture(scope="module")
def matrix(there: Path) -> Path:
    shown = make(there, "--matrix.neighbours", "goal", "bank")
    assert "exact 42 91.3%" in shown
    assert "drawn 2 4.3%" in shown
    assert "46 × 16" in shown
    facts = json.loads((there / "matrix" / "embeddings.json").read_text())
    assert {word for word, _ in facts["neighbours"]["goal"]} <= set(WORDS["sport"])
    assert load_embedding(there / "matrix").weight.shape == (46, 16)
    return there / "matrix"


@pytest.fixture
def job(matrix: Path, texts_csv: Path) -> list[str]:
    return [
        *("--model.name", str(matrix), "--model.hidden_size", "8", "--model.dropout", "0"),
        *("--data.name", str(texts_csv), "--train.global_batch", "12", "--train.steps", str(STEPS)),
        *("--optim.lr", "2e-2", "--run.dir", "run"),
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def reference(job: list[str], alone: Path) -> Path:
    if not (alone / "run").exists():
        shown = learn("word_cls", 1, job, alone)
        assert "on the same held-out samples" in shown
    return alone / "run"


def test_transferred_vectors_beside_random_ones(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = read(reference)
    random, transferred = report["baselines"]["random vectors"], report["test"]
    assert transferred["accuracy"] > random["accuracy"] + 0.1
    assert report["gain"] == pytest.approx(transferred["accuracy"] - random["accuracy"])
    assert random["units"] == transferred["units"] == 24
    assert toolkit(["predict", str(reference), "the goal of the striker", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "sport"


@pytest.mark.parametrize("strategy", CASES)
def test_the_same_numbers_everywhere(strategy: str, job: list[str], reference: Path, tmp_path: Path) -> None:
    expected, expected_report = read(reference)
    learn("word_cls", 2, [*job, "--train.micro_batch", "3", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    for figure in ("loss", "accuracy", "units"):
        assert report["test"][figure] == pytest.approx(expected_report["test"][figure], rel=1e-5)
        random, expected_random = (each["baselines"]["random vectors"] for each in (report, expected_report))
        assert random[figure] == pytest.approx(expected_random[figure], rel=1e-5)


def test_frozen_vectors_stay(job: list[str], matrix: Path, tmp_path: Path) -> None:
    learn("word_cls", 1, [*job, "--model.embedding", "frozen", "--train.steps", "2"], tmp_path)
    model = BagOfWordsForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(model.embedding.weight, load_embedding(matrix).weight)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = BagOfWordsForSequenceClassification(BagOfWordsConfig(vocab_size=9, embedding_size=8, num_labels=3)).eval()
    text, padded = torch.tensor([[4, 5, 6]]), torch.tensor([[4, 5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(text).logits, model(padded, attention_mask=mask).logits)
    assert not torch.allclose(model(text).logits, model(padded).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vectors.name", "nothing.txt"], "nothing.txt cannot be read"),
        (["--matrix.dimension", "16"], "--matrix.dimension 16 has no effect"),
        (["--matrix.neighbours", "ship"], "not in the vocabulary"),
        (["--vectors.take", "alone"], "has no effect on the file"),
    ],
)
def test_what_is_refused(options: list[str], said: str, there: Path) -> None:
    shown = make(there, *options, code=2)
    assert said in shown
    assert "Traceback" not in shown


def script(file: Path, options: list[str]) -> tuple[int, str]:
    """A file as python runs it, in this process (a forked one): exit code and what it printed as an error."""
    sys.argv = [str(file), *options]
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), text.getvalue()
    return 0, text.getvalue()


def test_several_processes_are_refused(tmp_path: Path) -> None:
    found = on_ranks(script, 2, RECIPE.with_stem("embedding_matrix"), ["--matrix.output", str(tmp_path / "two")])
    for code, text in found:
        assert code == 2
        assert "2 processes were started for what one of them does" in text


def test_a_folder_that_is_no_matrix(job: list[str], matrix: Path, tmp_path: Path) -> None:
    (tmp_path / "matrix").mkdir()
    (tmp_path / "matrix" / "embeddings.safetensors").write_bytes(b"")
    shown = learn("word_cls", 1, [*job, "--model.name", str(tmp_path / "matrix")], tmp_path, code=2)
    assert "is no whole matrix of embeddings" in shown
