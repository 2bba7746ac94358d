"""Plain texts to sequences of tokens: what is read, dropped, held out, cut, packed and mixed."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from toolkit.config import CorpusConfig, DecoderConfig, TokenizerConfig
from toolkit.data import LanguageData, TextCorpus, decoder_tokenizer, language, text_corpus
from toolkit.data.bpe import trained_tokenizer
from toolkit.data.files import ROLES
from toolkit.data.loader import BatchShape, Loader
from toolkit.errors import ConfigError, DataError, ModelError
from toolkit.samples import fetch

# Some of it in each of the scripts that text comes in.
TEXTS = [
    f"Report {i}: the market rose by {i} points, and 市场上涨了 {i} 点。\n" + "Naïve café! " * (i % 37)
    for i in range(200)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def corpus_of(*names: Any, **settings: Any) -> tuple[CorpusConfig, TextCorpus]:
    config = CorpusConfig(name=tuple(map(str, names)), **settings)
    return config, text_corpus(config)


def all_texts(corpus: TextCorpus) -> list[str]:
    return [text for role in ROLES for text in corpus.splits[role]["text"]]


def prepared(*names: Any, **settings: Any) -> tuple[LanguageData, TextCorpus, Any]:
    config, corpus = corpus_of(*names, **({"max_length": 32} | settings))
    tokenizer = trained_tokenizer(corpus, 400, 10**6)
    return language(config, corpus, tokenizer), corpus, tokenizer


# What is read


def test_files_of_every_kind_hold_the_same_texts(jsonl: Path, tmp_path: Path) -> None:
    texts = TEXTS[:40]
    many = tmp_path / "many" / "deeper"
    many.mkdir(parents=True)
    for i, text in enumerate(texts):
        (many / f"{i:03}.txt").write_text(text, encoding="utf-8")
    (many / ".hidden.txt").write_text("no")
    (tmp_path / "lines.txt").write_text("\n".join(text.replace("\n", " ") for text in texts), encoding="utf-8")
    (tmp_path / "paragraphs.txt.gz").write_bytes(gzip.compress("\n\n \n".join(texts).encode()))
    pq.write_table(pa.table({"content": texts, "other": range(40)}), tmp_path / "texts.parquet")
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    sources: list[tuple[Any, dict[str, Any]]] = [
        (tmp_path / "many", {}),
        (tmp_path / "lines.txt", {"texts_in": "line"}),
        (tmp_path / "paragraphs.txt.gz", {"texts_in": "paragraph"}),
        (tmp_path / "texts.parquet", {"text": "content"}),
        (tmp_path / "texts.csv", {}),
        (tmp_path / "*.csv", {}),
    ]
    found = [{" ".join(text.split()) for text in all_texts(corpus_of(name, **more)[1])} for name, more in sources]
    assert all(texts_ == {" ".join(text.split()) for text in texts} for texts_ in found)


def test_a_column_of_labels_is_not_needed_and_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": None}) + "\n" for text in TEXTS))
    assert sorted(all_texts(corpus_of(path)[1])) == sorted(TEXTS)


def test_repeats_and_blanks_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = [*TEXTS, *TEXTS[:7], "  ", "", " ".join(TEXTS[8].split())]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, corpus = corpus_of(path)
    assert corpus.facts["dropped"] == {"malformed": 0, "blank": 2, "repeated": 8, "in a held-out split": 0}
    assert sorted(all_texts(corpus)) == sorted(TEXTS)
    _, kept = corpus_of(path, deduplicate=False)
    train, held_out = kept.splits["train"]["text"], {*kept.splits["validation"]["text"], *kept.splits["test"]["text"]}
    assert held_out.isdisjoint(train)
    assert len(train) > len(set(train))


def test_what_is_held_out_is_not_trained_on(jsonl: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    _, corpus = corpus_of(jsonl, validation=(str(held),))
    assert sorted(corpus.splits["validation"]["text"]) == sorted(TEXTS[:20])
    assert set(corpus.splits["train"]["text"]).isdisjoint(TEXTS[:20])
    assert corpus.facts["dropped"]["in a held-out split"] == 20


def test_the_split_follows_from_the_texts_alone(jsonl: Path, tmp_path: Path) -> None:
    _, corpus = corpus_of(jsonl)
    mixed = tmp_path / "other name.jsonl"
    mixed.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(TEXTS)))
    _, again = corpus_of(mixed)
    assert set(again.splits["test"]["text"]) == set(corpus.splits["test"]["text"])
    assert len(corpus.splits["test"]) == len(corpus.splits["validation"]) == 6
    _, less = corpus_of(jsonl, train_texts=50)
    assert len(less.splits["train"]) == 50
    assert set(less.splits["test"]["text"]) == set(corpus.splits["test"]["text"])


def test_the_second_call_reads_what_the_first_has_made(jsonl: Path, cache: Path) -> None:
    _, corpus = corpus_of(jsonl)
    made = sorted(path.name for path in (cache / "data").iterdir() if not path.name.startswith("."))
    assert corpus_of(jsonl)[1].fingerprint == corpus.fingerprint
    assert sorted(path.name for path in (cache / "data").iterdir() if not path.name.startswith(".")) == made


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": ()}, ConfigError, "--data.name is empty"),
        ({"name": ("nowhere.txt",)}, DataError, "--data.name: there is no file or folder 'nowhere.txt'"),
        ({"name": ("sample:bbc-new",)}, ConfigError, "there is no sample 'bbc-new'"),
        ({"validation": ("nowhere/",)}, DataError, "--data.validation: there is no file or folder"),
        ({"validation_share": 0.6, "test_share": 0.5}, ConfigError, "hold out 1.1 of the data"),
        ({"text": "body"}, DataError, "has no column 'body'"),
    ],
)
def test_what_is_wrong_is_told(jsonl: Path, settings: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        text_corpus(CorpusConfig(**({"name": (str(jsonl),)} | settings)))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt, line 1: byte 0xe9 is not UTF-8"):
        corpus_of(tmp_path / "latin.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut.txt.gz is no whole gzip file"):
        corpus_of(tmp_path / "cut.txt.gz")
    (tmp_path / "one.txt").write_text("a single text")
    with pytest.raises(DataError, match=r"too few to hold some out") as caught:
        corpus_of(tmp_path / "one.txt")
    assert "--data.texts_in" in (caught.value.remedy or "")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'picture.png' is of no kind that can be read"):
        corpus_of(tmp_path / "picture.png")


# The tokenizer


def test_a_trained_tokenizer_gives_back_every_text(jsonl: Path) -> None:
    _, corpus = corpus_of(jsonl)
    tokenizer = trained_tokenizer(corpus, 300, 10**6)
    assert len(tokenizer) == 300
    strange = "🦜 and ؟ and \t\n\u200b 龘"
    for text in [*TEXTS[:20], strange]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id
    assert all(len(token) == 1 for token in tokenizer.tokenize("1234567"))
    again = trained_tokenizer(corpus, 300, 10**6)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert trained_tokenizer(corpus, 280, 10**6).get_vocab() != tokenizer.get_vocab()


def test_the_tokenizer_that_is_named(jsonl: Path) -> None:
    _, corpus = corpus_of(jsonl)
    named = decoder_tokenizer(DecoderConfig(), TokenizerConfig(name="sample:minilm"), corpus)
    assert named.get_vocab() == AutoTokenizer.from_pretrained(fetch("minilm")).get_vocab()
    with pytest.raises(ConfigError, match=r"--tokenizer.vocabulary has no effect"):
        decoder_tokenizer(DecoderConfig(), TokenizerConfig(name="sample:minilm", vocabulary=300), corpus)
    with pytest.raises(ModelError):
        decoder_tokenizer(DecoderConfig(), TokenizerConfig(name="./nowhere"), corpus)


def test_a_tokenizer_without_an_end_is_refused(jsonl: Path) -> None:
    config, corpus = corpus_of(jsonl)
    with pytest.raises(ConfigError, match="no end token"):
        language(config, corpus, AutoTokenizer.from_pretrained(fetch("minilm")))


# Sequences


@pytest.mark.parametrize("max_length", [8, 32, 4096])
def test_the_pieces_hold_every_text_once(jsonl: Path, max_length: int) -> None:
    data, corpus, tokenizer = prepared(jsonl, max_length=max_length)
    end = tokenizer.eos_token_id
    for role in ROLES:
        predicted: list[int] = []
        sequences = getattr(data, role)
        assert list(sequences["id"]) == list(range(len(sequences)))
        for row in sequences:
            assert sum(row["pieces"]) == row["length"] == len(row["input_ids"]) <= max_length
            at = 0
            for length in row["pieces"]:
                predicted += row["input_ids"][at + 1 : at + length]
                at += length
        expected = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in corpus.splits[role]["text"]
        ]
        assert len(predicted) == sum(map(len, expected))
        if max_length == 4096:  # no text is cut
            parts = "".join(map(chr, predicted)).split(chr(end))[:-1]
            assert sorted(parts) == sorted("".join(map(chr, ids[:-1])) for ids in expected)
        assert sorted(predicted) == sorted(token for ids in expected for token in ids)
        assert sum(sequences["bytes"]) == sum(len(text.encode()) for text in corpus.splits[role]["text"])


def test_facts(jsonl: Path) -> None:
    data, corpus, tokenizer = prepared(jsonl)
    facts = data.facts
    assert facts["tokens"]["train"] == sum(
        len(tokenizer(text)["input_ids"]) + 2 for text in corpus.splits["train"]["text"]
    )
    assert facts["sequences"]["train"] == len(data.train)
    assert 0.9 < facts["filled"]["train"] <= 1
    assert 0 < facts["cut"]["train"] < 1
    assert facts["passes"] == [1.0]


# Mixtures


def test_sources_give_the_shares_that_they_are_to_give(jsonl: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.jsonl"
    small.write_text("".join(json.dumps({"text": f"Verse {i} " + "la " * 40}) + "\n" for i in range(30)))
    settings = {"weights": (0.25, 0.75), "max_length": 64}
    data, _, tokenizer = prepared(jsonl, small, **settings)
    of_small = ["Verse" in tokenizer.decode(data.train[[row]]["input_ids"][0]) for row in range(len(data.train))]
    assert np.mean(of_small) == pytest.approx(0.75, abs=0.01)
    assert data.facts["passes"][0] == pytest.approx(1, abs=0.01)
    assert data.facts["passes"][1] > 2
    # Each sequence in whole passes, or once more; no text of one source beside one of the other.
    rows = [tuple(ids) for ids in data.train[list(range(len(data.train)))]["input_ids"]]
    times = {rows.count(row) for row in set(rows) if "Verse" in tokenizer.decode(row)}
    assert times == {math.floor(data.facts["passes"][1]), math.ceil(data.facts["passes"][1])}
    mixed = [text for row in rows if "Verse" in (text := tokenizer.decode(row)) and "Report" in text]
    assert mixed == []


def test_the_loader_deals_a_mixture(jsonl: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Verse {i} la la"}) + "\n" for i in range(30)))
    data, _, _ = prepared(jsonl, other, weights=(1, 2))
    loader = Loader(data.train, lambda columns, empty: columns["id"], BatchShape(4, 4, 1, 1), rank=0, seed=0)
    seen = [int(row) for step in loader.steps(loader.steps_per_epoch) for ids in step.micro_batches for row in ids]
    assert sorted(seen) == list(range(len(data.train)))


def test_the_mixture_is_part_of_the_fingerprint(jsonl: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Verse {i} la la"}) + "\n" for i in range(30)))
    plain, even, odd = (prepared(jsonl, other, weights=w)[0].fingerprint for w in ((), (1, 1), (1, 2)))
    assert len({plain, even, odd}) == 3


@pytest.mark.parametrize(
    ("weights", "message"), [((1.0,), "no effect on one source"), ((1, 2), "2 numbers for the 1 source")]
)
def test_weights_that_make_no_sense(jsonl: Path, weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(jsonl, weights=weights)
