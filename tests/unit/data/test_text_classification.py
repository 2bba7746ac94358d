"""The verb as a whole: from a source to tokens, once for all ranks, and the same every time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from text_data import CountingTokenizer, content, rows, tokenizer, write_csv, write_jsonl
from tokenizers import processors
from transformers import AutoTokenizer

from toolkit import samples
from toolkit.config import TextDataConfig
from toolkit.data import TextClassification, text_classification
from toolkit.data.mapping import process_count, quiet
from toolkit.data.tokenize import tokenizer_fingerprint
from toolkit.errors import ConfigError, DataError

TABLE = rows(300)
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TOOLKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def counted() -> CountingTokenizer:
    CountingTokenizer.calls = 0
    found = tokenizer(row["text"] for row in TABLE)
    assert isinstance(found, CountingTokenizer)
    return found


def everything(found: TextClassification) -> Any:
    return [content(getattr(found, split)) for split in SPLITS], found.labels, found.facts, found.fingerprint


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, counted: CountingTokenizer) -> None:
    name = write_jsonl(tmp_path / "a.jsonl", TABLE)
    found = text_classification(TextDataConfig(name=str(name), max_length=9), counted)
    assert found.labels == ("business", "sport", "tech")
    seen = []
    for split in SPLITS:
        dataset = getattr(found, split)
        assert dataset.column_names == ["input_ids", "label", "length", "id"]
        assert list(dataset["id"]) == sorted(dataset["id"])
        for row in dataset:
            source = TABLE[row["id"]]
            assert row["input_ids"] == counted(source["text"], truncation=True, max_length=9)["input_ids"]
            assert (row["input_ids"][0], row["input_ids"][-1]) == (counted.cls_token_id, counted.sep_token_id)
            assert row["length"] == len(row["input_ids"]) <= 9
            assert found.labels[row["label"]] == source["label"]
            seen.append(row["id"])
    assert sorted(seen) == list(range(300))


def test_facts(tmp_path: Path, counted: CountingTokenizer) -> None:
    name = write_jsonl(tmp_path / "a.jsonl", [*TABLE, TABLE[0], {"text": "\u200b", "label": "tech"}])
    found = text_classification(TextDataConfig(name=str(name), max_length=9), counted)
    facts = json.loads(json.dumps(found.facts))
    assert facts == found.facts
    assert facts["source"] == str(name)
    assert facts["rows_read"] == {"train": 302}
    assert facts["duplicates_dropped"] == 1
    edges = facts["token_lengths"]["edges"]
    for split in SPLITS:
        dataset = getattr(found, split)
        ids = [row["id"] for row in dataset]
        whole = [
            len(counted(({300: TABLE[0], 301: {"text": "\u200b"}}.get(i) or TABLE[i])["text"])["input_ids"])
            for i in ids
        ]
        assert facts["truncated"][split] == pytest.approx(sum(length > 9 for length in whole) / len(whole))
        bins = [sum(low <= n < high for n in whole) for low, high in zip(edges, [*edges[1:], 1e9], strict=True)]
        assert facts["token_lengths"][split] == bins
        assert sum(facts["samples"][split].values()) == len(dataset)
    assert any("1 texts of the " in warning and "no token but special ones" in warning for warning in facts["warnings"])


def test_the_second_call_tokenises_nothing(tmp_path: Path, cache: Path, counted: CountingTokenizer) -> None:
    config = TextDataConfig(name=str(write_jsonl(tmp_path / "a.jsonl", TABLE)))
    first = text_classification(config, counted)
    calls, files = CountingTokenizer.calls, snapshot(cache)
    assert calls > 0
    # What the tokenizer was called with in between is no part of it.
    counted(["a", "b c"], padding=True, truncation=True, max_length=5)
    second = text_classification(config, counted)
    assert CountingTokenizer.calls == calls + 1
    assert snapshot(cache) == files
    assert everything(second) == everything(first)
    # Neither is the name of the file, nor how many processes do the work.
    moved = write_jsonl(tmp_path / "elsewhere" / "b.jsonl", TABLE)
    same = dataclasses.replace(config, name=str(moved), workers=2, tokenize_processes=2)
    third = text_classification(same, counted)
    assert (third.fingerprint, CountingTokenizer.calls) == (first.fingerprint, calls + 1)
    assert third.facts == first.facts | {"source": str(moved)}


def test_the_result_follows_content_settings_and_tokenizer(tmp_path: Path, counted: CountingTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TABLE)
    config = TextDataConfig(name=str(path))
    first = text_classification(config, counted)
    changed = {"max_length": 8, "split_seed": 3, "train_samples": 50, "test_share": 0.3, "deduplicate": False}
    prints = {
        text_classification(dataclasses.replace(config, **{key: value}), counted).fingerprint
        for key, value in changed.items()
    }  # type: ignore[arg-type]
    other = tokenizer(row["text"] for row in TABLE[:50])
    prints.add(text_classification(config, other).fingerprint)
    counted.truncation_side = "left"
    prints.add(text_classification(config, counted).fingerprint)
    counted.truncation_side = "right"
    # Other content under the same name, length and time.
    before = path.stat()
    path.write_text(path.read_text().replace("market", "tekram"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    second = text_classification(config, counted)
    assert content(second.train) != content(first.train)
    prints |= {first.fingerprint, second.fingerprint}
    assert len(prints) == len(changed) + 4


def test_truncation_on_the_left(tmp_path: Path, counted: CountingTokenizer) -> None:
    counted.truncation_side = "left"
    found = text_classification(
        TextDataConfig(name=str(write_jsonl(tmp_path / "a.jsonl", TABLE)), max_length=6), counted
    )
    row = next(row for row in found.train if row["length"] == 6)
    assert row["input_ids"][1:] == counted(TABLE[row["id"]]["text"])["input_ids"][-5:]


@pytest.mark.parametrize("damage", ["facts", "arrow", "split", "rows"])
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path, cache: Path, counted: CountingTokenizer) -> None:
    config = TextDataConfig(name=str(write_jsonl(tmp_path / "a.jsonl", TABLE)))
    first = everything(text_classification(config, counted))
    folder = cache / "data" / first[-1]
    if damage == "facts":
        (folder / "facts.json").write_text("{")
    elif damage == "arrow":
        arrow = next((folder / "train").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:-1000])
    elif damage == "split":
        shutil.rmtree(folder / "test")
    else:
        shutil.rmtree(folder / "test")
        shutil.copytree(folder / "validation", folder / "test")
    (cache / "data" / f".{first[-1]}-killed").mkdir()
    assert everything(text_classification(config, counted)) == first
    assert [path.name for path in (cache / "data").iterdir() if path.suffix != ".lock"] == [first[-1]]


def test_a_refusal_leaves_nothing_behind(tmp_path: Path, cache: Path, counted: CountingTokenizer) -> None:
    path = write_csv(tmp_path / "a.csv", TABLE)
    path.write_text(path.read_text() + "x,y,z\n")
    with pytest.raises(DataError, match="line 302: 3 fields"):
        text_classification(TextDataConfig(name=str(path)), counted)
    assert [file.suffix for file in (cache / "data").iterdir()] == [".lock"]
    assert CountingTokenizer.calls == 0


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: CountingTokenizer
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"could not be written to .*\n.*set TOOLKIT_CACHE"):
        text_classification(TextDataConfig(name=str(write_csv(tmp_path / "a.csv", TABLE))), counted)


def test_several_processes_give_the_same_as_one(tmp_path: Path, counted: CountingTokenizer) -> None:
    config = TextDataConfig(name=str(write_jsonl(tmp_path / "a.jsonl", TABLE)), tokenize_processes=1)
    alone = text_classification(config, counted)
    shutil.rmtree(samples.cache_folder())
    together = text_classification(dataclasses.replace(config, tokenize_processes=3), counted)
    assert everything(together) == everything(alone)
    assert process_count(10, None) == 1
    assert process_count(10**9, None) <= 8
    assert process_count(10, 4) == 4
    assert process_count(2, 4) == 2


RANK = """
import json, sys, time
from pathlib import Path
from text_data import CountingTokenizer
from toolkit.config import TextDataConfig
from toolkit.data import text_classification

rank, tokenizer, name, folder = sys.argv[1:]
loaded = CountingTokenizer.from_pretrained(tokenizer)
(Path(folder) / rank).touch()
while len(list(Path(folder).iterdir())) < 2:  # both at once
    time.sleep(0.001)
found = text_classification(TextDataConfig(name=name), loaded)
splits = [[row for row in split] for split in (found.train, found.validation, found.test)]
print(json.dumps([CountingTokenizer.calls, found.fingerprint, found.labels, found.facts, splits]))
"""


def test_two_ranks_at_once(tmp_path: Path, counted: CountingTokenizer) -> None:
    name = write_jsonl(tmp_path / "a.jsonl", TABLE)
    counted.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "ready").mkdir()
    ranks = []
    for rank in range(2):
        # String hashes differ between the two, as they do between real ranks.
        environment = {**os.environ, "RANK": str(rank), "PYTHONHASHSEED": str(rank + 1)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        arguments = [str(rank), str(tmp_path / "tokenizer"), str(name), str(tmp_path / "ready")]
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "it/s" not in errors
        assert "examples/s" not in errors
        results.append(json.loads(output))
    assert results[0][1:] == results[1][1:]
    assert sorted(result[0] > 0 for result in results) == [False, True]  # one did the work
    here = text_classification(TextDataConfig(name=str(name)), counted)
    assert results[0][1] == here.fingerprint


def test_chinese(tmp_path: Path) -> None:
    nouns, good, bad = (
        ["手机", "电影", "酒店", "书", "服务", "房间", "屏幕", "早餐"],
        ["很好", "喜欢", "满意", "推荐"],
        ["很差", "失望", "糟糕", "退货"],
    )
    table = [
        {"文本": f"这个{noun}我{word},{i}分。", "标签": label}
        for i in range(5)
        for noun in nouns
        for label, words in (("正面", good), ("负面", bad))
        for word in words
    ]
    table.append({**table[0], "文本": f"\u3000{table[0]['文本']} "})
    made = tokenizer(row["文本"] for row in table)
    path = write_csv(tmp_path / "评论.csv", table)
    found = text_classification(TextDataConfig(name=str(path), text="文本", label="标签"), made)
    assert found.labels == ("正面", "负面")
    assert found.facts["duplicates_dropped"] == 1
    assert found.facts["unknown_tokens"]["train"] == 0
    row = found.test[0]
    expected = table[row["id"]]
    assert found.labels[row["label"]] == expected["标签"]
    assert made.decode(row["input_ids"], skip_special_tokens=True).replace(" ", "") == expected["文本"]
    # And a tokenizer that was made for another language is told.
    english = tokenizer(row["text"] for row in TABLE)
    warnings = text_classification(TextDataConfig(name=str(path), text="文本", label="标签"), english).facts["warnings"]
    assert any("unknown to the tokenizer: is it made for this language?" in warning for warning in warnings)


def test_lengths_that_do_not_fit(tmp_path: Path, counted: CountingTokenizer) -> None:
    name = str(write_csv(tmp_path / "a.csv", TABLE))
    with pytest.raises(ConfigError, match=r"--data.max_length 2 leaves no room beside the 2 special tokens"):
        text_classification(TextDataConfig(name=name, max_length=2), counted)
    counted.model_max_length = 32
    assert any(
        "beyond the 32 tokens" in text
        for text in text_classification(TextDataConfig(name=name), counted).facts["warnings"]
    )


def test_texts_without_a_token(tmp_path: Path, counted: CountingTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TABLE, {"text": "\u200b", "label": "tech"}])
    counted.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match=r"1 texts of the \w+ split give no token at all"):
        text_classification(TextDataConfig(name=str(path)), counted)


def test_the_fingerprint_of_a_tokenizer_is_that_of_its_copy(tmp_path: Path, counted: CountingTokenizer) -> None:
    counted("a b c", truncation=True, max_length=4)
    counted.save_pretrained(tmp_path / "t")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "t")) == tokenizer_fingerprint(counted)


def test_quiet_sets_back_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.enable_progress_bars()
    level, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    assert not hidden
    for rank, bars in (("0", False), ("0", True), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        with quiet(bars=bars):
            assert datasets.are_progress_bars_disabled() == (not bars or rank == "1")
        assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == (level, hidden)


def test_real_news(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sample itself is shared with other runs; what is made of it is not.
    monkeypatch.delenv("TOOLKIT_CACHE")
    sample, minilm = samples.fetch("bbc-news"), samples.fetch("minilm")
    monkeypatch.setenv("TOOLKIT_CACHE", str(cache))
    (cache / "samples").symlink_to(sample.parent)
    made = AutoTokenizer.from_pretrained(minilm)
    found = text_classification(TextDataConfig(), made)
    assert len(found.labels) == 5
    assert found.facts["rows_read"] == {"train": 2225}
    assert found.facts["duplicates_dropped"] == 100  # 98 to the letter, and 2 in other white space
    assert [sum(found.facts["samples"][split].values()) for split in SPLITS] == [1488, 212, 425]
    began = time.monotonic()
    again = text_classification(TextDataConfig(), made)
    assert time.monotonic() - began < 1
    assert everything(again) == everything(found)
