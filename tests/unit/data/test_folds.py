"""Cross-validation: folds that leak nothing, and statistics of what is left."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.job import tiny_tokenizer
from toolkit.config import CorpusConfig, SourcesConfig, TextDataConfig
from toolkit.data import labelled_texts, text_corpus
from toolkit.data.rows import gather_rows, write
from toolkit.data.sources import resolve
from toolkit.data.split import check_folds
from toolkit.data.text_classification import cleaned_and_split
from toolkit.errors import ConfigError, DataError


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    lines = [f"text number {row},{'good' if row % 3 else 'bad'}" for row in range(60)]
    lines += lines[:7]  # repeats, which must not be in two folds
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return tmp_path / "reviews.csv"


def splits(config: TextDataConfig, scratch: Path) -> list[set[str]]:
    scratch.mkdir()
    corpus, _, chosen, _ = cleaned_and_split(config, resolve(config), scratch)
    texts = np.array(corpus.texts["text"][:])
    return [set(texts[chosen.roles == role]) for role in range(3)]


def test_each_text_is_tested_once(reviews: Path, tmp_path: Path) -> None:
    tested: list[str] = []
    for fold in range(5):
        config = TextDataConfig(name=str(reviews), folds=5, fold=fold)
        train, validation, test = splits(config, tmp_path / f"scratch{fold}")
        assert not train & test
        assert not train & validation
        assert not validation & test
        assert len(train | validation | test) == 60
        assert len(test) == 12
        labels = [int(text.split()[-1]) % 3 == 0 for text in test]
        assert sum(labels) == 4  # a third of each fold, as of all
        tested += test
    assert len(tested) == len(set(tested)) == 60


def test_folds_of_plain_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lines.txt").write_text("\n".join(f"line {number}" for number in range(40)), encoding="utf-8")
    tested: list[str] = []
    for fold in range(4):
        config = CorpusConfig(name=(str(tmp_path / "lines.txt"),), texts_in="line", folds=4, fold=fold)
        corpus = text_corpus(config)
        tested += corpus.splits["test"]["text"][:]
        assert len(corpus.splits["test"]) == 10
    assert len(set(tested)) == 40


REFUSED = {
    "no folds": ({"fold": 1}, ConfigError, "--data.fold 1 has no effect without"),
    "no such fold": ({"folds": 3, "fold": 3}, ConfigError, "--data.fold 3 is none of 3 folds"),
    "a rare class": ({"folds": 21}, DataError, "too few rows to be in each of 21 folds, after cleaning: 'bad' (20)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, reviews: Path, tmp_path: Path) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error) as caught:
        splits(TextDataConfig(name=str(reviews), **options), tmp_path / "scratch")  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_folds_beside_a_test_that_is_given() -> None:
    with pytest.raises(ConfigError, match="--data.folds 3 has no effect beside a test split that is given"):
        check_folds(TextDataConfig(folds=3), given_test=True)


@pytest.fixture
def authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 authors of 1 to 12 texts each, and two texts of nobody."""
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    names = [f"author {letter}" for letter in "abcdefghijkl" for _ in range(ord(letter) - ord("a") + 1)] + ["", ""]
    lines = [f"text number {row},{'good' if row % 3 else 'bad'},{name}" for row, name in enumerate(names)]
    (tmp_path / "authors.csv").write_text("\n".join(["text,label,who", *lines]), encoding="utf-8")
    return tmp_path / "authors.csv"


def test_no_author_is_parted(authors: Path, tmp_path: Path) -> None:
    """Of all seeds and folds; and each text is in the test of one fold."""
    who = dict(line.rsplit(",", 2)[::2] for line in authors.read_text().splitlines()[1:])
    for seed in range(5):
        config = TextDataConfig(name=str(authors), group="who", split_seed=seed)
        parts = splits(config, tmp_path / f"seed{seed}")
        whose = [{who[text] for text in part} - {""} for part in parts]
        assert len(set.union(*whose)) == sum(map(len, whose))
        assert sum(map(len, parts)) == 80
        assert 6 <= len(parts[2]) <= 26, "about a fifth"
    tested: list[str] = []
    for fold in range(4):
        config = TextDataConfig(name=str(authors), group="who", folds=4, fold=fold)
        train, validation, test = splits(config, tmp_path / f"fold{fold}")
        assert not {who[text] for text in test} & ({who[text] for text in train | validation} - {""})
        tested += test
    assert len(tested) == len(set(tested)) == 80


def test_authors_that_are_held_out_are_not_trained_on(authors: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.csv"
    held.write_text("text,label,who\nanother text,good,author l\none more,bad,author k\n", encoding="utf-8")
    config = TextDataConfig(name=str(authors), test=str(held), group="who")
    (tmp_path / "scratch").mkdir()
    _, _, chosen, _ = cleaned_and_split(config, resolve(config), tmp_path / "scratch")
    assert np.sum(chosen.roles == 0) + np.sum(chosen.roles == 1) == 80 - 12 - 11
    assert any("23 rows were dropped because rows of their group" in warning for warning in chosen.warnings)


@pytest.mark.parametrize("kind", ["texts", "rows"])
def test_no_author_of_any_rows_is_parted(kind: str, authors: Path, tmp_path: Path) -> None:
    """Plain texts and rows of whatever kind; and each row is in the test of one fold."""
    who = dict(line.rsplit(",", 2)[::2] for line in authors.read_text().splitlines()[1:])

    def parts(**settings: Any) -> list[list[str]]:
        options: dict[str, Any] = {"name": (str(authors),), "group": "who", **settings}
        if kind == "texts":
            splits = text_corpus(CorpusConfig(**options)).splits
            return [list(splits[role]["text"]) for role in ("train", "validation", "test")]
        splits = gather_rows(SourcesConfig(**options), write, ("rows", "mend them"), {"kind": "any"}, str).splits
        return [[json.loads(row)["text"] for row in splits[role]["text"]] for role in ("train", "validation", "test")]

    tested: list[str] = []
    for fold in range(4):
        found = parts(folds=4, fold=fold, validation_share=0.2)
        whose = [{who[text] for text in part} - {""} for part in found]
        assert len(set.union(*whose)) == sum(map(len, whose)) == 12
        assert sum(map(len, found)) == 80
        tested += found[2]
    assert len(tested) == len(set(tested)) == 80
    held = tmp_path / "held.csv"
    held.write_text("text,label,who\nanother text,good,author l\none more,bad,author k\n", encoding="utf-8")
    train, validation, test = parts(test=(str(held),), validation_share=0.2)
    assert len(test) == 2
    assert len(train) + len(validation) == 80 - 12 - 11, "of whom a text is in the test"


def test_no_author_of_numbers_is_parted(authors: Path, tmp_path: Path) -> None:
    rows = [f"text number {row},{row / 40 - 1},author {row % 9}" for row in range(80)]
    (tmp_path / "numbers.csv").write_text("\n".join(["text,label,who", *rows]), encoding="utf-8")
    data = labelled_texts(
        TextDataConfig(name=str(tmp_path / "numbers.csv"), target="number", group="who"), tiny_tokenizer()
    )
    whose = [
        {round((value + 1) * 40) % 9 for value in part["label"]} for part in (data.train, data.validation, data.test)
    ]
    assert len(set.union(*whose)) == sum(map(len, whose)) == 9


def test_groups_that_are_refused(authors: Path, reviews: Path, tmp_path: Path) -> None:
    def read(**settings: Any) -> None:
        config = TextDataConfig(**{"name": str(authors), "group": "who"} | settings)
        with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
            cleaned_and_split(config, resolve(config), Path(scratch))

    for settings, message in (
        ({"name": str(reviews)}, "has no column 'who'"),
        ({"group": "label"}, "is the text or the label too"),
        ({"folds": 20}, "14 groups in the training data, where 20 splits or folds take 20"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            read(**settings)
    with pytest.raises(DataError, match="no column 'whom'"):
        text_corpus(CorpusConfig(name=(str(authors),), group="whom"))
    with pytest.raises(DataError, match=r"80 malformed rows are left out: 80 because they have no column 'whom'"):
        gather_rows(
            SourcesConfig(name=(str(authors),), group="whom"), write, ("rows", "mend them"), {"kind": "any"}, str
        )
    with pytest.raises(DataError, match=r"14 groups in the training data, where 20 splits or folds take 20"):
        text_corpus(CorpusConfig(name=(str(authors),), group="who", folds=20))
    (tmp_path / "texts" / "good").mkdir(parents=True)
    (tmp_path / "texts" / "good" / "1.txt").write_text("a text")
    with pytest.raises(DataError, match="text files have no column 'who'"):
        read(name=str(tmp_path / "texts"))
    with pytest.raises(DataError, match="text files have no column 'who'"):
        text_corpus(CorpusConfig(name=(str(tmp_path / "texts" / "good"),), group="who"))
