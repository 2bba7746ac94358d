"""Several labels of a text, numbers, pairs: what is read, and figures as scikit-learn and scipy have them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, mean_absolute_error, r2_score
from transformers import AutoTokenizer

from tests.parity.job import tiny_tokenizer
from toolkit.config import TextDataConfig
from toolkit.data import labelled_texts
from toolkit.errors import ConfigError, DataError
from toolkit.samples import fetch
from toolkit.tasks import MultiLabel, Regression

LABELS = ("a", "b", "c", "d")


def summed(task: Any, logits: torch.Tensor, labels: Any, cuts: list[slice]) -> dict[str, Any]:
    """The metrics of some batches, of which each could be on another process; filler among them."""
    total: dict[str, torch.Tensor] = {}
    for cut in [*cuts, None]:
        empty, rows = cut is None, cut or slice(0, 1)
        ids = list(range(len(logits)))[rows]
        columns = {"input_ids": [[5]] * len(ids), "label": list(labels[rows]), "id": ids}
        batch = task.collate(columns, empty=empty)
        for name, count in task.measure(SimpleNamespace(logits=logits[rows]), batch).items():
            total[name] = total.get(name, 0) + count
    return task.metrics(total)  # type: ignore[no-any-return]


def test_figures_of_labels() -> None:
    task = MultiLabel(LABELS, tiny_tokenizer())
    torch.manual_seed(0)
    truth = (torch.rand(50, 4) < torch.tensor([0.7, 0.3, 0.1, 0.0])).long()
    logits = truth + torch.randn(50, 4) - 0.3
    logits[:, 3] = -1
    found = summed(task, logits, truth.tolist(), [slice(0, 7), slice(7, 50)])
    said = (logits.sigmoid() >= 0.5).numpy()
    assert found["micro_f1"] == pytest.approx(f1_score(truth, said, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro", zero_division=0))
    assert [row["support"] for row in found["per_class"]] == truth.sum(0).tolist()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.float())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["units"] == 50


def test_figures_of_numbers() -> None:
    task = Regression(("stars",), tiny_tokenizer(), slots=50)
    rng = np.random.default_rng(0)
    truth = rng.integers(-4, 5, 50).astype(float)  # with ties
    said = np.round(truth + rng.normal(0, 2, 50), 1)
    found = summed(task, torch.tensor(said)[:, None], truth.tolist(), [slice(20, 50), slice(0, 13), slice(13, 20)])
    assert found["pearson"] == pytest.approx(pearsonr(said, truth).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(said, truth).statistic)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, said))
    assert found["r2"] == pytest.approx(r2_score(truth, said))
    assert found["rmse"] ** 2 == pytest.approx(found["loss"], rel=1e-6)
    constant = summed(task, torch.ones(50, 1), truth.tolist(), [slice(0, 50)])
    assert (constant["pearson"], constant["spearman"]) == (0, 0)


@pytest.mark.parametrize(
    ("task", "label", "reason"),
    [
        (MultiLabel(LABELS, tiny_tokenizer()), [0, 1, 1], "its labels are not 4 of 0 and 1"),
        (MultiLabel(LABELS, tiny_tokenizer()), [0, 1, 2, 0], "its labels are not 4 of 0 and 1"),
        (Regression(("x",), tiny_tokenizer(), slots=1), float("nan"), "its label nan is no number"),
        (Regression(("x",), tiny_tokenizer(), slots=1), None, "its label None is no number"),
    ],
)
def test_samples_that_cannot_be_used(task: Any, label: Any, reason: str) -> None:
    assert task.problem({"input_ids": [5], "label": label, "id": 0}) == reason


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))

    def file(labels: list[Any], **more: Any) -> TextDataConfig:
        with (tmp_path / "texts.jsonl").open("w", encoding="utf-8") as out:
            for number, label in enumerate(labels):
                row = {"text": f"w{number % 70 + 10} w{number}", "second": f"w{number % 50 + 10}", "label": label}
                out.write(json.dumps(row) + "\n")
        return TextDataConfig(name=str(tmp_path / "texts.jsonl"), tokenize_processes=1, **more)

    return file


def test_labels_are_lists_or_words_with_a_separator(write: Any) -> None:
    lists = [["red", "blue"], ["blue"], [], ["green", "red"]] * 10
    data = labelled_texts(write(lists, target="labels"), tiny_tokenizer())
    assert data.labels == ("blue", "green", "red")
    assert (len(data.train), len(data.validation), len(data.test)) == (28, 4, 8)
    hot = [*data.train["label"], *data.validation["label"], *data.test["label"]]
    assert sorted(map(tuple, hot)) == sorted([(1, 0, 1), (1, 0, 0), (0, 0, 0), (0, 1, 1)] * 10)
    words = ["|".join(some) for some in lists]
    again = labelled_texts(write(words, target="labels", separator="|"), tiny_tokenizer())
    assert again.labels == data.labels
    assert [*again.test["label"]] == [*data.test["label"]]
    assert 0 < data.facts["constant"]["micro_f1"] < 1


def test_numbers_and_what_their_mean_reaches(write: Any) -> None:
    values = [round(0.1 * number - 2, 1) for number in range(40)]
    data = labelled_texts(write(values, target="number", test_samples=5, train_samples=20), tiny_tokenizer())
    assert data.labels == ("label",)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 5)
    mean = np.mean(data.train["label"])
    assert data.facts["constant"]["mae"] == pytest.approx(np.abs(np.array(data.test["label"]) - mean).mean())
    assert sum(data.facts["samples"]["train"].values()) == 20
    large = labelled_texts(write([1000.0 * value for value in values], target="number"), tiny_tokenizer())
    assert any("learnt slowly" in warning for warning in large.facts["warnings"])


def test_folds_and_form_of_numbers(write: Any) -> None:
    """Each text is tested once, and read in the form that was asked for."""
    tested = []
    for fold in range(4):
        config = write([0.1 * number for number in range(40)], target="number", folds=4, fold=fold)
        data = labelled_texts(config, tiny_tokenizer())
        assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 10)
        tested += [round(10 * number) for number in data.test["label"]]
    assert sorted(tested) == list(range(40))
    wide = [{"text": f"ｗ{number + 10}", "label": 0.1 * number} for number in range(40)]
    file = Path(config.name)
    file.write_text("".join(json.dumps(row) + "\n" for row in wide), encoding="utf-8")
    options: dict[str, Any] = {"name": str(file), "target": "number", "tokenize_processes": 1}
    unknown = tiny_tokenizer().unk_token_id
    as_they_are = labelled_texts(TextDataConfig(**options), tiny_tokenizer())
    assert all(unknown in ids for ids in as_they_are.train["input_ids"])
    narrow = labelled_texts(TextDataConfig(**options, normalise=("nfkc",)), tiny_tokenizer())
    assert not any(unknown in ids for ids in narrow.train["input_ids"])


def test_pairs_are_read_together(write: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    data = labelled_texts(write([f"class {n % 2}" for n in range(40)], text_pair="second"), tokenizer)
    assert data.labels == ("class 0", "class 1")
    assert {"input_ids", "token_type_ids", "label", "length", "id"} <= set(data.train.column_names)
    for ids, segments in zip(data.train["input_ids"], data.train["token_type_ids"], strict=True):
        assert len(ids) == len(segments)
        assert segments == sorted(segments)
        assert sum(segments) == len(ids) - ids.index(tokenizer.sep_token_id) - 1, "the second text, and its end"
    assert sum(data.facts["samples"]["test"].values()) == 8


@pytest.mark.parametrize(
    ("labels", "settings", "error", "message"),
    [
        (["a", "b"] * 20, {"separator": ";"}, ConfigError, "--data.separator has no effect with --data.target class"),
        (
            ["a", "b"] * 20,
            {"text_pair": "second", "group": "text"},
            ConfigError,
            "--data.group text is the text or the",
        ),
        (
            [1.5, 2.5] * 120,
            {"target": "number", "group": "who"},
            DataError,
            "no column 'who' \\(--data.group\\) but text",
        ),
        (["a", "b"] * 20, {"text_pair": "text"}, ConfigError, "names the column 'text' as another setting does"),
        (["a", "b"] * 99, {"target": "number"}, DataError, "(?s)row 1 of .*texts.jsonl, because .*'a' is no number"),
        ([1.5, None] * 101, {"target": "number"}, DataError, "row 2 of .*label None is no number"),
        ([0.5, 1.25] * 20, {"text_pair": "second"}, DataError, "regression, not classification"),
        ([[1.5]] * 150, {"target": "labels"}, DataError, "neither a list nor words with a separator"),
        ([["a"]] * 150, {"text_pair": "second"}, DataError, "learn several labels of a text with --data.target labels"),
        (["a"] * 40, {"text_pair": "second"}, DataError, "the training data has 1 labels"),
        (list(range(40)), {"text_pair": "second"}, DataError, "probably an identifier"),
        (["a", "b"] * 99, {"text_pair": "secnd"}, DataError, "they have no column 'secnd' but text, second, label"),
    ],
)
def test_what_is_refused(labels: Any, settings: Any, error: Any, message: str, write: Any) -> None:
    with pytest.raises(error, match=message):
        labelled_texts(write(labels, **settings), tiny_tokenizer())


def test_the_plain_path_points_to_the_settings(write: Any) -> None:
    with pytest.raises(DataError) as found:
        labelled_texts(write([0.5, 1.25] * 20), tiny_tokenizer())
    assert "--data.target number" in found.value.remedy
    with pytest.raises(DataError) as found:
        labelled_texts(write([["a", "b"]] * 40), tiny_tokenizer())
    assert "--data.target labels" in found.value.remedy
