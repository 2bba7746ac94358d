"""Every kind of source gives the same rows, and every bad one a message that names the fault and the remedy."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from text_data import content, rows, tokenizer, write_csv, write_jsonl

from toolkit.config import TextDataConfig
from toolkit.data import TextClassification, hub, text_classification
from toolkit.errors import ConfigError, DataError, ToolkitError

TABLE = rows()
TOKENIZER = tokenizer(row["text"] for row in TABLE)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def prepare(name: Path | str, **settings: Any) -> TextClassification:
    return text_classification(TextDataConfig(name=str(name), max_length=16, **settings), TOKENIZER)


def refuse(name: Path | str, *parts: str, kind: type[ToolkitError] = DataError, **settings: Any) -> str:
    """The message of the refusal, which must hold all of `parts`, a remedy, and fit on a screen."""
    with pytest.raises(kind) as caught:
        prepare(name, **settings)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert caught.value.remedy
    assert len(message) < 1200
    return message


def to_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(TABLE).to_parquet(str(path))
    return path


def to_json(path: Path) -> Path:
    path.write_text(json.dumps(TABLE, indent=1))
    return path


def zipped(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


KINDS: dict[str, Callable[[Path], Path]] = {
    "csv": lambda folder: write_csv(folder / "a.csv", TABLE),
    "csv with a mark of byte order": lambda folder: with_mark(write_csv(folder / "a.csv", TABLE)),
    "tsv": lambda folder: write_csv(folder / "a.tsv", TABLE, "\t"),
    "jsonl": lambda folder: write_jsonl(folder / "a.jsonl", TABLE),
    "json": lambda folder: to_json(folder / "a.json"),
    "parquet": lambda folder: to_parquet(folder / "a.parquet"),
    "csv.gz": lambda folder: zipped(write_csv(folder / "a.csv", TABLE)),
    "jsonl.gz": lambda folder: zipped(write_jsonl(folder / "a.jsonl", TABLE)),
    "brackets in the name": lambda folder: write_csv(folder / "a[1].csv", TABLE),
    "folder of shards": lambda folder: shards(folder),
    "glob": lambda folder: shards(folder) / "p*.jsonl",
    "other columns": lambda folder: write_csv(folder / "a.csv", [{"n": i, **row} for i, row in enumerate(TABLE)]),
}


def with_mark(path: Path) -> Path:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def shards(folder: Path) -> Path:
    """Shards that do not even agree on their columns."""
    write_jsonl(folder / "p0.jsonl", TABLE[:50])
    write_jsonl(folder / "p1.jsonl", [{"more": 1, **row} for row in TABLE[50:]])
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    # Against the table itself, so that a fault common to all readers would show.
    found = prepare(KINDS[kind](tmp_path))
    assert found.labels == ("business", "sport", "tech")
    all_rows = sorted(content(found.train) + content(found.validation) + content(found.test))
    expected = TOKENIZER([row["text"] for row in TABLE], truncation=True, max_length=16)["input_ids"]
    assert all_rows == [
        (i, found.labels.index(row["label"]), ids) for i, (row, ids) in enumerate(zip(TABLE, expected, strict=True))
    ]
    # The split follows from the texts, not from the kind of file.
    if kind != "csv":
        reference = prepare(KINDS["csv"](tmp_path / "reference"))
        assert content(found.test) == content(reference.test)


def test_folders_of_text_files(tmp_path: Path) -> None:
    for i, row in enumerate(TABLE):
        (tmp_path / "set" / row["label"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / row["label"] / f"{i:03}.txt").write_text(row["text"])
    found = prepare(tmp_path / "set")
    assert found.labels == ("business", "sport", "tech")
    assert [sum(found.facts["samples"][split].values()) for split in ("train", "validation", "test")] == [84, 12, 24]
    (tmp_path / "set" / "sport" / "000.txt").write_bytes("Müller".encode("latin1"))
    refuse(tmp_path / "set", "sport/000.txt, line 1: byte 0xfc is not UTF-8", "iconv -f ISO-8859-1 -t UTF-8")
    (tmp_path / "set" / "sport" / "000.txt").write_text("")
    (tmp_path / "set" / "odd").mkdir()
    assert prepare(tmp_path / "set").facts["text_nulls_dropped"] == 1
    write_csv(tmp_path / "set" / "a.csv", TABLE)
    refuse(tmp_path / "set", "mixes data files (a.csv …) with folders of text files (business …)", "glob")


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev"])
def test_a_folder_of_splits(word: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", TABLE[:60])
    write_csv(tmp_path / "train-1.csv", TABLE[60:80])
    write_jsonl(tmp_path / f"{word}.jsonl", TABLE[80:100])
    write_csv(tmp_path / "test.csv", TABLE[100:])
    write_csv(tmp_path / "sample_submission.csv", TABLE)
    found = prepare(tmp_path)
    assert found.facts["rows_read"] == {"train": 80, "validation": 20, "test": 20}
    assert sorted(found.test["id"]) == list(range(100, 120))
    assert sorted(found.validation["id"]) == list(range(80, 100))
    assert any("sample_submission.csv left aside" in warning for warning in found.facts["warnings"])


def test_splits_as_folders_of_text_files(tmp_path: Path) -> None:
    for i, row in enumerate(TABLE):
        folder = tmp_path / ("test" if i >= 90 else "train") / row["label"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(row["text"])
    assert prepare(tmp_path).facts["rows_read"] == {"train": 90, "test": 30}


def test_given_validation_and_test(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", TABLE[:80])
    found = prepare(
        train,
        validation=str(write_jsonl(tmp_path / "b.jsonl", TABLE[80:100])),
        test=str(write_csv(tmp_path / "c" / "c.csv", TABLE[100:]).parent),
    )
    assert [len(found.train), len(found.validation), len(found.test)] == [80, 20, 20]
    only_test = prepare(train, test=str(tmp_path / "c" / "*.csv"), validation_share=0.25)
    assert [len(only_test.train), len(only_test.validation), len(only_test.test)] == [60, 20, 20]


def test_words_that_other_readers_take_for_missing_or_for_numbers(tmp_path: Path) -> None:
    table = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("NA", "None", "null")]
    table[0]["text"] = "NaN"
    assert prepare(write_csv(tmp_path / "a.csv", table)).labels == ("NA", "None", "null")
    numbers = [{"text": f"{i}{i:03}", "label": i % 3 * 5} for i in range(30)]
    assert prepare(write_csv(tmp_path / "b.csv", numbers)).labels == ("0", "5", "10")
    assert prepare(write_jsonl(tmp_path / "b.jsonl", numbers)).labels == ("0", "5", "10")
    floats = [{**row, "label": f"{row['label']}.0"} for row in numbers]
    assert prepare(write_csv(tmp_path / "c.csv", floats)).labels == ("0", "5", "10")
    zeros = [{**row, "label": f"0{row['label']}"} for row in numbers]
    assert prepare(write_csv(tmp_path / "z.csv", zeros)).labels == ("00", "05", "010")
    truths = [{**row, "label": row["label"] == 5} for row in numbers]
    assert prepare(write_jsonl(tmp_path / "d.jsonl", truths)).labels == ("false", "true")


# What is refused, and how.


def test_missing_files(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", TABLE)
    refuse(tmp_path / "review.csv", "there is no file or folder", "Did you mean 'reviews.csv'?", "Relative names")
    refuse(f"{tmp_path}/nowhere/at/all", "--data.name: there is no file or folder")
    refuse(f"{tmp_path}/*.jsonl", "no file matches")
    refuse(tmp_path / "reviews.csv", "--data.test: there is no file or folder 'x.csv'", test="x.csv")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "has no data files; it has nothing", "one folder of .txt files for each class")
    (tmp_path / "a.xlsx").write_text("")
    refuse(tmp_path / "a.xlsx", "'a.xlsx' is of no kind that can be read", "CSV")
    refuse("", "--data.name is empty", kind=ConfigError)
    refuse("sample:bbc", "no sample 'bbc'", "bbc-news", kind=ConfigError)
    refuse(tmp_path / "reviews.csv", "--data.revision v1 cannot take effect", revision="v1", kind=ConfigError)


def test_folders_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_csv(tmp_path / "a" / "one.csv", TABLE)
    write_jsonl(tmp_path / "a" / "two.jsonl", TABLE)
    refuse(tmp_path / "a", "mixes kinds of files: 1 × csv, 1 × jsonl", "'*.csv'")
    write_csv(tmp_path / "b" / "test.csv", TABLE)
    write_csv(tmp_path / "b" / "rows.csv", TABLE)
    refuse(tmp_path / "b", "has test.csv, but no training file", "--data.test")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_missing_column(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    refuse(path, f"a.{kind} has no column 'texts'; it has 'text', 'label'. Did you mean 'text'?", text="texts")
    refuse(path, "has no column 'klass'", "--data.label", label="klass")


def test_nothing_in_the_file(tmp_path: Path) -> None:
    for name, text in {"a.csv": "", "b.csv": "text,label\n", "c.jsonl": "", "d.jsonl": "\n\n", "e.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        refuse(tmp_path / name, f"{name} has no rows")
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(str(tmp_path / "f.parquet"))
    refuse(tmp_path / "f.parquet", "f.parquet has no rows")


def test_other_encodings(tmp_path: Path) -> None:
    latin = "text,label\nfine,a\nMüller,b\n".encode("latin1")
    (tmp_path / "a.csv").write_bytes(latin)
    refuse(
        tmp_path / "a.csv", "a.csv, line 3: byte 0xfc is not UTF-8", "iconv -f ISO-8859-1 -t UTF-8 > '", "utf8-a.csv"
    )
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(latin))
    refuse(tmp_path / "b.csv.gz", "b.csv.gz, line 3: byte 0xfc", "gunzip -c '")
    (tmp_path / "c.csv").write_bytes("text,label\nx,y\n".encode("utf-16"))
    refuse(tmp_path / "c.csv", "c.csv, line 1: byte 0xff", "iconv -f UTF-16")
    (tmp_path / "d.jsonl").write_bytes('{"text":"a","label":1}\n{"text":"é","label":1}\n'.encode("latin1"))
    refuse(tmp_path / "d.jsonl", "d.jsonl, line 2: byte 0xe9 is not UTF-8")


def test_malformed_lines(tmp_path: Path) -> None:
    faults = {
        "more.csv": ("text,label\na,1\nb,c,2\n", "line 3: 3 fields, where the header names 2"),
        "fewer.csv": ('text,label\n"a\nb",1\nb\n', "line 4: 1 fields, where the header names 2"),
        "shifted.csv": ("text,label\nx,a,1\ny,b,2\n", "line 2: 3 fields, where the header names 2"),
        "open.csv": ('text,label\na,1\n"b,2\nc,1\n', "line 3: a quote that is not closed"),
        "inner.tsv": ('text\tlabel\na\t1\n"b" said\t2\n', "line 3: a quote that is not closed or not doubled"),
        "a.jsonl": ('{"text":"a","label":1}\n\n{"text":"b",\n', "a.jsonl, line 3: not JSON"),
        "b.jsonl": ('{"text":"a","label":1}\n[1]\n', "b.jsonl, line 2: a list, not an object"),
        "c.json": ('[{"text":"a","label":1},\n{"text" "b"}]', "c.json, line 2: not JSON"),
        "d.parquet": ("PAR", "d.parquet is no Parquet file"),
        "e.csv.gz": ("text,label\n", "e.csv.gz is no whole gzip file"),
        "f.jsonl.gz": ("{}", "f.jsonl.gz is no whole gzip file"),
        "g.jsonl": (
            '{"text":"a","label":1}\n{"text":"b","label":"x"}\n',
            "'label' of",
            "words in some rows and numbers",
        ),
        "h.jsonl": ('{"text":["a"],"label":1}\n{"text":["b"],"label":2}\n', "column 'text' of", "holds lists"),
    }
    for name, (text, *parts) in faults.items():
        (tmp_path / name).write_text(text)
        refuse(tmp_path / name, *parts)
    whole = zipped(write_csv(tmp_path / "cut.csv", TABLE))
    whole.write_bytes(whole.read_bytes()[:-20])
    refuse(whole, "cut.csv.gz is no whole gzip file", "Copy or compress it again")


# The hub.


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that refuses connections, and an empty cache of its client."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_cannot_be_reached() -> None:
    began = time.monotonic()
    message = refuse(
        "owner/name", "the hub cannot be reached for 'owner/name'", "there is no file or folder of that name"
    )
    assert "Give a local file or folder, or one of the samples: sample:bbc-news, sample:" in message
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        refuse("owner/name", "the hub cannot be reached for 'owner/name'")
        assert time.monotonic() - began < 5


def test_a_hub_data_set_from_the_cache(no_hub: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "topic": datasets.ClassLabel(names=["tech", "sport", "business"])}
    )
    table = [{"sentence": row["text"], "topic": row["label"]} for row in TABLE]
    secret = [{"sentence": f"secret {i}", "topic": -1} for i in range(9)]
    files = {}
    for split, part in {"train": table[:90], "validation": table[90:], "test": secret}.items():
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_list(part, features=features).to_parquet(files[split])
    # As the library leaves it behind after a download: OWNER___NAME/CONFIGURATION/VERSION/COMMIT/NAME-SPLIT.arrow
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").glob("parquet/*/*/*/dataset_info.json")).parent
    kept = no_hub / "owner___my_set" / "default" / "0.0.0" / commit
    shutil.copytree(made, kept)
    for arrow in kept.glob("parquet-*.arrow"):
        arrow.rename(arrow.with_name(arrow.name.replace("parquet", "my_set", 1)))
    info = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "my_set"}))

    settings = {"text": "sentence", "label": "topic"}
    found = prepare("owner/my_set", **settings)
    assert found.labels == ("business", "sport", "tech")
    assert found.facts["rows_read"] == {"train": 90, "validation": 30}  # the test split has no labels
    assert [found.labels[label] for label in found.validation["label"]] == [row["label"] for row in TABLE[90:]]
    assert any("taken from the cache, at 0123456" in warning for warning in found.facts["warnings"])
    # A pinned commit in the cache needs no hub, and no warning; another revision cannot be told from it.
    pinned = prepare("owner/my_set", revision=commit, **settings)
    assert pinned.fingerprint == found.fingerprint
    assert pinned.facts["warnings"] == found.facts["warnings"][1:]
    refuse("owner/my_set", "cannot be reached", f"The cache holds it at {commit}", revision="v2", **settings)
    refuse("owner/my_set", "owner/my_set (train) has no column 'text'; it has 'sentence', 'topic'")
