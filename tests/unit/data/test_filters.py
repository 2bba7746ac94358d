"""Texts that are too short, too long or in another language are left out of training, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.edited import all_texts, cleaned, write
from toolkit.config import ChatConfig, CorpusConfig
from toolkit.data import text_corpus
from toolkit.data.chat import conversations
from toolkit.errors import ConfigError, DataError
from toolkit.requirements import optional
from toolkit.samples import fetch

SENTENCES = {
    "en": "The government has said that it will publish its report on the economy before the end of week {}.",
    "de": "Die Regierung hat erklärt, dass sie ihren Bericht über die Wirtschaft vor Ende der Woche {} vorlegen werde.",
    "zh": "政府表示，将在第{}周结束之前公布关于经济形势的报告，并听取各方面的意见。",
    "fr": "Le gouvernement a déclaré qu'il publierait son rapport sur l'économie avant la fin de la semaine {}.",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """As many texts of each language as its place says: 10, 11, 12, 13."""
    texts = [
        sentence.format(number) for place, sentence in enumerate(SENTENCES.values()) for number in range(10 + place)
    ]
    return write(tmp_path / "mixed.jsonl", texts)


# Languages


def test_languages_that_are_named_stay_and_all_are_counted(mixed: Path) -> None:
    corpus = cleaned(mixed, languages=("en", "zh"))
    left = all_texts(corpus)
    assert sum("The government" in text for text in left) == 10
    assert sum("政府" in text for text in left) == 12
    assert len(left) == 22
    assert corpus.facts["dropped"]["in another language"] == 24
    assert corpus.facts["languages"] == {"fr": 13, "zh": 12, "de": 11, "en": 10}
    assert list(corpus.facts["languages"]) == ["fr", "zh", "de", "en"]
    everything = cleaned(mixed)
    assert len(all_texts(everything)) == 46
    assert everything.facts["languages"] == {}
    assert "in another language" not in everything.facts["dropped"]
    assert everything.fingerprint != corpus.fingerprint


@pytest.mark.parametrize(("sample", "language"), [("bbc-news", "en"), ("peoples-daily", "zh")])
def test_real_articles(sample: str, language: str, tmp_path: Path) -> None:
    with (fetch(sample) / "data.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines][:300]
    corpus = cleaned(write(tmp_path / "texts.jsonl", texts), languages=("en", "zh"), deduplicate=False)
    assert corpus.facts["languages"].get(language, 0) >= 299


def test_a_language_that_is_not_known_is_refused_with_those_that_are(mixed: Path) -> None:
    for wrong, said in (
        ("english", "'english' is no language that can be told."),
        ("cn", "'cn' is no language that can be told."),
        ("wuu", "'wuu' is no language that can be told. It counts as zh."),
    ):
        with pytest.raises(ConfigError) as caught:
            cleaned(mixed, languages=("en", wrong))
        assert f"--data.languages: {said}" in caught.value.message
        assert "Known are ace, af, am, " in caught.value.remedy
        assert ", zh, " in caught.value.remedy
        assert "yue" not in caught.value.remedy


# Lengths


def test_lengths_are_of_characters_without_repeated_blanks(tmp_path: Path) -> None:
    texts = ["a" * 9, "a" * 10, "b" * 5 + " \n\t " * 5 + "b" * 4, "字" * 10, "c" * 20, "d" * 21, "字" * 21, " " * 30]
    path = write(tmp_path / "texts.jsonl", texts)
    corpus = cleaned(path, min_chars=10, max_chars=20)
    assert sorted(all_texts(corpus)) == sorted([texts[1], texts[2], texts[3], texts[4]])
    dropped = corpus.facts["dropped"]
    assert (dropped["of too few characters"], dropped["of too many characters"], dropped["blank"]) == (1, 2, 1)
    assert "of too many characters" not in cleaned(path, min_chars=10).facts["dropped"]
    assert len(all_texts(cleaned(path, max_chars=20))) == 5


def test_a_text_is_dropped_for_one_reason(mixed: Path) -> None:
    longest = len(SENTENCES["de"].format(10))
    corpus = cleaned(mixed, min_chars=50, max_chars=longest - 1, languages=("en",))
    dropped = corpus.facts["dropped"]
    assert dropped["of too few characters"] == 12
    assert sum(dropped.values()) + len(all_texts(corpus)) == 46
    assert dropped["of too many characters"] > 0 < dropped["in another language"]


# What they do not touch


def test_splits_that_are_given_stay_as_they_are(mixed: Path, tmp_path: Path) -> None:
    given = [SENTENCES["fr"].format(99), "Oui.", SENTENCES["en"].format(99)]
    held = write(tmp_path / "held.jsonl", given)
    corpus = cleaned(mixed, validation=held, min_chars=20, languages=("en",))
    assert corpus.splits["validation"]["text"] == given
    assert len(corpus.splits["train"]) + len(corpus.splits["test"]) == 10


def test_conversations_are_measured_by_what_is_said(tmp_path: Path) -> None:
    def row(question: str, answer: str) -> dict[str, Any]:
        system = {"role": "system", "content": SENTENCES["de"].format(1) * 3}
        return {"messages": [system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    rows = [row(SENTENCES["zh"].format(number), SENTENCES["zh"].format(-number)) for number in range(10)]
    rows += [row("Why?", "So."), row(SENTENCES["fr"].format(1), SENTENCES["fr"].format(2))]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    settings: dict[str, Any] = {"min_chars": 10, "languages": ("zh",), "validation_share": 0.2, "test_share": 0.2}
    corpus = conversations(ChatConfig(name=(str(path),), **settings))
    assert corpus.facts["dropped"]["of too few characters"] == 1
    assert corpus.facts["dropped"]["in another language"] == 1
    assert corpus.facts["languages"]["zh"] == 10


# What is refused


def test_what_leaves_nothing(mixed: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data.min_chars 20 and --data.max_chars 10 leave no text"):
        text_corpus(CorpusConfig(name=(str(mixed),), min_chars=20, max_chars=10))
    with pytest.raises(
        DataError, match=r"0 training texts are left after cleaning \(dropped: 46 of too few characters"
    ):
        cleaned(mixed, min_chars=10**6, near_duplicates=0.8)


def test_a_library_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(
        ConfigError, match=r"--data.languages needs nowhere_to_be_found, which is not installed"
    ) as caught:
        optional("nowhere_to_be_found.inside", "--data.languages", "clean")
    assert "pip install 'largemodel-toolkit[clean]'" in caught.value.remedy
