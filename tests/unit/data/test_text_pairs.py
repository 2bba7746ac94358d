"""Pairs of texts: what is read, refused, cut and learnt, and the tokenizer of both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chats import chat_tokenizer
from tests.pairs import write_pairs
from tests.unit.data.text_data import write_jsonl
from toolkit.config import EncoderDecoderConfig, SummaryConfig, TextPairsConfig, TokenizerConfig
from toolkit.data import encode_pairs, pairs_tokenizer, question, text_pairs
from toolkit.errors import ConfigError, DataError

SHARES = {"validation_share": 0.1, "test_share": 0.1}


@pytest.fixture
def config(tmp_path: Path) -> TextPairsConfig:
    return TextPairsConfig((str(write_pairs(tmp_path / "pairs.jsonl")),), **SHARES)  # type: ignore[arg-type]


def test_pairs_as_tokens_of_one_vocabulary(config: TextPairsConfig) -> None:
    corpus = text_pairs(config)
    tokenizer = pairs_tokenizer(EncoderDecoderConfig(), TokenizerConfig(vocabulary=400), corpus)
    data = encode_pairs(config, corpus, tokenizer)
    assert sum(map(len, (data.train, data.validation, data.test))) == 240
    row = data.train[0]
    end = tokenizer.eos_token_id
    assert row["input_ids"][-1] == row["labels"][-1] == end
    assert tokenizer.decode(row["input_ids"][:-1]) == row["given"]
    assert tokenizer.decode(row["labels"][:-1]) == row["wanted"]
    assert row["length"] == len(row["input_ids"]) + len(row["labels"])
    assert len(tokenizer("sees")["input_ids"]) < 5  # both sides were learnt from
    assert len(tokenizer("看见")["input_ids"]) < 7


def test_what_is_too_long_loses_its_end(config: TextPairsConfig) -> None:
    corpus = text_pairs(config)
    tokenizer = pairs_tokenizer(EncoderDecoderConfig(), TokenizerConfig(vocabulary=300), corpus)
    short = TextPairsConfig(config.name, max_length=5, max_target_length=4, **SHARES)  # type: ignore[arg-type]
    data = encode_pairs(short, corpus, tokenizer)
    assert max(len(row["input_ids"]) for row in data.train) == 5
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in data.train)
    assert max(len(row["labels"]) for row in data.train) == 4
    cut = [row for row in data.train if row["cut"]]
    assert any(row["labels"][-1] != tokenizer.eos_token_id for row in cut)
    assert data.facts["cut"]["train"] == pytest.approx(len(cut) / len(data.train))


def test_a_chat_model_is_asked(config: TextPairsConfig) -> None:
    asked = SummaryConfig(config.name, max_length=6, instruction="Say it in Chinese.", **SHARES)  # type: ignore[arg-type]
    corpus, tokenizer = text_pairs(config), chat_tokenizer()
    row = encode_pairs(asked, corpus, tokenizer, asked=asked.instruction).train[0]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("<|im_start|>user\nSay it in Chinese.\n\n" + row["given"][:4])
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert row["cut"]
    assert row["given"] not in text
    assert tokenizer.decode(row["labels"]) == row["wanted"] + "<|im_end|>"
    whole = encode_pairs(SummaryConfig(config.name, **SHARES), corpus, tokenizer, asked="?").train[0]  # type: ignore[arg-type]
    assert whole["input_ids"] == question("?\n\n" + whole["given"], tokenizer)


def test_two_text_files_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes("\ufeffone\r\ntwo\r\n\nfour\nfive\nsix\nseven".encode())
    (tmp_path / "a.zh").write_bytes("一\n二\n三\n四\n\xff\n六\n七\n".encode("latin-1", "ignore"))
    (tmp_path / "a.zh").write_bytes("一\n二\n三\n四\n".encode() + b"\xff\n" + "六\n七\n".encode())
    name = f"{tmp_path / 'a.en'},{tmp_path / 'a.zh'}"
    corpus = text_pairs(TextPairsConfig((name,), validation_share=0.3, test_share=0.3))
    pairs = [json.loads(text) for split in corpus.splits.values() for text in split["text"]]
    assert sorted(pairs) == sorted([["one", "一"], ["two", "二"], ["four", "四"], ["six", "六"], ["seven", "七"]])
    (warning,) = corpus.facts["warnings"]
    assert "their column 'source' is missing or empty (first: row 3 of" in warning
    assert "they are not UTF-8 (first: row 5 of" in warning


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        ({"a.en": "1\n2\n", "a.zh": "1\n"}, "a.en,a.zh", "a.en has 2 lines and"),
        ({"a.en": "1\n"}, "a.en,a.zh", "there is no file"),
    ],
)
def test_files_that_do_not_match(files: dict[str, str], name: str, said: str, tmp_path: Path) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    names = ",".join(str(tmp_path / part) for part in name.split(","))
    with pytest.raises(DataError, match=said):
        text_pairs(TextPairsConfig((names,)))


def test_rows_that_are_no_pairs(tmp_path: Path) -> None:
    good = [{"source": f"text {number}", "target": f"文 {number}"} for number in range(20)]
    rows = [*good, {"source": "alone"}, {"source": "x", "target": " "}, {"source": 5, "target": "x"}]
    corpus = text_pairs(TextPairsConfig((str(write_jsonl(tmp_path / "a.jsonl", rows)),), **SHARES))  # type: ignore[arg-type]
    (warning,) = corpus.facts["warnings"]
    assert "2 because their column 'target' is missing or empty (first: row 21" in warning
    assert "their column 'source' is of type int" in warning
    with pytest.raises(DataError, match="name their columns with --data.source and --data.target"):
        text_pairs(TextPairsConfig((str(tmp_path / "a.jsonl"),), source="english", max_bad_rows=3))


def test_settings_without_effect() -> None:
    with pytest.raises(ConfigError, match="both name the column"):
        text_pairs(TextPairsConfig(source="target"))
    with pytest.raises(ConfigError, match="no effect beside --model.name"):
        pairs_tokenizer(EncoderDecoderConfig(name="a"), TokenizerConfig(name="b"), None)  # type: ignore[arg-type]
