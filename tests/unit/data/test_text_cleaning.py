"""What is dropped before the split, what is refused, and how rows are shared out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from text_data import Row, content, rows, tokenizer, write_csv, write_jsonl

from toolkit.config import TextDataConfig
from toolkit.data import TextClassification, text_classification
from toolkit.data.clean import DROPPED, code_labels, drop_leaks, drop_repeats, normalised
from toolkit.data.split import apportion, limit, shuffle_key
from toolkit.errors import ConfigError, DataError, ToolkitError

TABLE = rows()
TOKENIZER = tokenizer(row["text"] for row in TABLE)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def prepare(table: list[Row], folder: Path, **settings: Any) -> TextClassification:
    name = write_jsonl(folder / "rows.jsonl", table)
    return text_classification(TextDataConfig(name=str(name), **settings), TOKENIZER)


def refuse(table: list[Row], folder: Path, *parts: str, kind: type[ToolkitError] = DataError, **settings: Any) -> None:
    with pytest.raises(kind) as caught:
        prepare(table, folder, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 1200


def texts_of(found: TextClassification, table: list[Row]) -> list[set[str]]:
    """The normalised texts of the three splits."""
    return [
        {normalised(table[i]["text"]) for i in split["id"]} for split in (found.train, found.validation, found.test)
    ]


def with_repeats(seed: int) -> list[Row]:
    """Rows of which many are there again: in other white space, decomposed, or under another label."""
    rng = random.Random(seed)
    table = [{**row, "text": f"{row['text']} café"} for row in TABLE]
    for row in rng.sample(table, 60):
        table.append({**row, "text": rng.choice(["  {} ", "{}", "{}\n"]).format(row["text"].replace(" ", " \t"))})
    for row in rng.sample(table, 20):
        table.append({**row, "text": row["text"].replace("é", "e\u0301")})
    for row in rng.sample(table, 10):
        table.append({**row, "label": "tech" if row["label"] == "sport" else "sport"})
    rng.shuffle(table)
    return table


@pytest.mark.parametrize("seed", range(3))
def test_repeats_are_dropped_before_the_split(seed: int, tmp_path: Path) -> None:
    table = with_repeats(seed)
    labels: dict[str, set[str]] = {}
    first: dict[str, int] = {}
    for i, row in enumerate(table):
        labels.setdefault(normalised(row["text"]), set()).add(row["label"])
        first.setdefault(normalised(row["text"]), i)
    kept = {text for text, found in labels.items() if len(found) == 1}
    conflicts = sum(normalised(row["text"]) not in kept for row in table)

    found = prepare(table, tmp_path)
    train, validation, test = texts_of(found, table)
    assert not train & (validation | test)
    assert not validation & test
    assert train | validation | test == kept
    ids = [*found.train["id"], *found.validation["id"], *found.test["id"]]
    assert sorted(ids) == sorted(first[text] for text in kept)  # the first row of each
    assert found.facts["conflicts_dropped"] == conflicts > 0
    assert found.facts["duplicates_dropped"] == len(table) - conflicts - len(kept) > 0
    assert any("under two labels" in warning for warning in found.facts["warnings"])


def test_repeats_may_be_kept_for_training_but_are_never_tested_on(tmp_path: Path) -> None:
    table = with_repeats(0)
    found = prepare(table, tmp_path, deduplicate=False)
    train, validation, test = texts_of(found, table)
    assert not train & (validation | test)
    assert not validation & test
    assert len(found.train) > len(train)
    assert found.facts["duplicates_dropped"] == found.facts["conflicts_dropped"] == 0
    kept = len(found.train) + len(found.validation) + len(found.test)
    assert kept + found.facts["repeats_after_split_dropped"] == len(table)
    assert any("also in a split that is tested on" in warning for warning in found.facts["warnings"])


def test_a_class_that_is_nothing_but_one_repeated_text(tmp_path: Path) -> None:
    table = [*TABLE, *({"text": "again and again", "label": "odd"} for _ in range(20))]
    refuse(table, tmp_path, "all training rows of class 'odd' have texts that are also in", deduplicate=False)
    refuse(table, tmp_path, "'odd' (1)")


def test_leaks_are_dropped_from_training(tmp_path: Path) -> None:
    train, validation, test = TABLE[:80], TABLE[80:100], TABLE[100:]
    leaky = [*train, {**validation[3], "text": f" {validation[3]['text']}\n"}, test[0], test[1]]
    found = prepare(
        leaky,
        tmp_path,
        validation=str(write_csv(tmp_path / "v.csv", [*validation, test[5]])),
        test=str(write_csv(tmp_path / "t.csv", [*test, test[7]])),
    )
    assert found.facts["leaks_dropped"] == 3
    assert found.facts["validation_rows_in_test_dropped"] == 1
    assert [len(found.train), len(found.validation), len(found.test)] == [80, 20, 21]
    assert sorted(found.train["id"]) == list(range(80))
    warnings = " ".join(found.facts["warnings"])
    assert "3 training rows were dropped because their text is also in validation or test" in warnings
    assert "1 rows of the test split repeat the text of another one; they are kept" in warnings
    refuse(
        train,
        tmp_path,
        "the validation split has no rows left",
        validation=str(tmp_path / "t.csv"),
        test=str(tmp_path / "t.csv"),
    )


def test_a_few_missing_values_are_dropped_and_more_refused(tmp_path: Path) -> None:
    table = [dict(row) for row in TABLE]
    table[7]["text"], table[8]["text"], table[9]["label"] = None, " \t", None
    found = prepare(table, tmp_path)
    assert found.facts["text_nulls_dropped"] == 2
    assert found.facts["label_nulls_dropped"] == 1
    assert len(found.train) + len(found.validation) + len(found.test) == 117
    assert not {7, 8, 9} & {*found.train["id"], *found.validation["id"], *found.test["id"]}
    assert "2 rows without a text were dropped" in found.facts["warnings"]
    for i in range(20, 26):
        table[i]["text"] = ""
    refuse(table, tmp_path, "8 of 120 rows of the train split (7%) have no text: row 8 of", "rows.jsonl", "--data.text")
    table = [{**row, "label": None if i < 9 else row["label"]} for i, row in enumerate(TABLE)]
    refuse(table, tmp_path, "9 of 120 rows of the train split (8%) have no label: row 1 of", "row 3 of", "--data.label")


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    rng = random.Random(0)
    scores = [{**row, "label": round(rng.uniform(-4, 4), 2)} for row in TABLE]
    refuse(scores, tmp_path, "column 'label' holds measurements (-", "which is regression", "--data.label")
    identifiers = [{**row, "label": f"id{i}"} for i, row in enumerate(TABLE)]
    refuse(identifiers, tmp_path, "column 'label' has 120 classes in 120 rows (id0, ", "probably an identifier")
    same = [{**row, "label": "x"} for row in TABLE]
    refuse(same, tmp_path, "the training data has 1 class: 'x'; it takes two", "--data.label")


def test_a_class_that_is_too_rare(tmp_path: Path) -> None:
    table = [*TABLE, {"text": "one of a kind", "label": "odd"}, {"text": "and one more", "label": "odd"}]
    refuse(
        table, tmp_path, "too few rows to be in each of 3 splits", "'odd' (2)", "Remove or merge", "--data.validation"
    )
    table.append({"text": "the third", "label": "odd"})
    found = prepare(table, tmp_path)
    assert [found.facts["samples"][split]["odd"] for split in ("train", "validation", "test")] == [1, 1, 1]


def test_a_label_that_training_lacks(tmp_path: Path) -> None:
    test = write_csv(tmp_path / "t.csv", [*TABLE[100:], {"text": "hm", "label": "Sport"}])
    refuse(
        TABLE[:100],
        tmp_path,
        "the test split has rows of class 'Sport'",
        "(1 rows, first row 21 of",
        "t.csv)",
        test=str(test),
    )
    sport_only = [row for row in TABLE[100:] if row["label"] == "sport"]
    found = prepare(TABLE[:100], tmp_path, test=str(write_csv(tmp_path / "s.csv", sport_only)))
    assert "the test split has no row of class 'business', 'tech'" in found.facts["warnings"]


def test_shares_that_leave_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validation_share": 0.5, "test_share": 0.5}
    refuse(TABLE, tmp_path, "--data.validation_share 0.5 and --data.test_share 0.5", kind=ConfigError, **settings)
    # Where a split is given, its share is not taken.
    prepare(TABLE[:80], tmp_path, test=str(write_csv(tmp_path / "t.csv", TABLE[80:])), **settings)


def test_splits_are_stratified_and_seeded(tmp_path: Path) -> None:
    found = prepare(TABLE, tmp_path)
    assert found.facts["samples"] == {
        "train": {"business": 42, "sport": 28, "tech": 14},
        "validation": {"business": 6, "sport": 4, "tech": 2},
        "test": {"business": 12, "sport": 8, "tech": 4},
    }
    other = prepare(TABLE, tmp_path, split_seed=1)
    assert set(other.test["id"]) != set(found.test["id"])
    assert other.facts["samples"] == found.facts["samples"]
    assert other.fingerprint != found.fingerprint
    # The order of the rows in the source does not matter.
    upside_down = prepare(TABLE[::-1], tmp_path)
    assert texts_of(upside_down, TABLE[::-1]) == texts_of(found, TABLE)


def test_limits_are_stratified_and_nested(tmp_path: Path) -> None:
    whole = prepare(TABLE, tmp_path)
    small = prepare(TABLE, tmp_path, train_samples=12, validation_samples=6, test_samples=2)
    assert small.facts["samples"]["train"] == {"business": 6, "sport": 4, "tech": 2}
    assert small.facts["samples"]["validation"] == {"business": 3, "sport": 2, "tech": 1}
    assert sum(small.facts["samples"]["test"].values()) == 2
    assert any("the test split has no row of class" in warning for warning in small.facts["warnings"])
    smaller = prepare(TABLE, tmp_path, train_samples=9)
    assert set(smaller.train["id"]) < set(small.train["id"]) < set(whole.train["id"])
    assert content(smaller.test) == content(whole.test)
    assert content(prepare(TABLE, tmp_path, train_samples=999).train) == content(whole.train)
    refuse(TABLE, tmp_path, "--data.train_samples 2 is fewer than the 3 classes", train_samples=2, kind=ConfigError)


def test_large_shares_leave_training_rows_of_every_class(tmp_path: Path) -> None:
    table = [*TABLE, *({"text": f"{word} of a kind", "label": "odd"} for word in ("one", "two", "three", "four"))]
    found = prepare(table, tmp_path, validation_share=0.45, test_share=0.45)
    assert found.facts["samples"]["train"]["odd"] == 1
    assert sum(found.facts["samples"]["test"].values()) == 56


# The parts, against plain computations.


def test_what_makes_texts_equal() -> None:
    assert normalised(" Cafe\u0301\n\tau\u3000lait ") == normalised("Caf\u00e9 au lait") == "Caf\u00e9 au lait"
    assert normalised("Caf\u00e9") != normalised("caf\u00e9")


def test_apportion_is_exact_and_fair() -> None:
    rng = np.random.default_rng(0)
    cases = 0
    for _ in range(300):
        counts = rng.integers(1, 200, rng.integers(1, 12))
        total = int(rng.integers(0, counts.sum() + 1))
        seats = apportion(total, counts, counts)
        cases += 1
        assert seats.sum() == total
        assert np.all(seats <= counts)
        if total >= len(counts):
            assert np.all(seats >= 1)
            raised = np.maximum(0, 1 - counts * total / counts.sum()).sum()  # given beyond their share to the rare
            assert np.all(np.abs(seats - counts * total / counts.sum()) < 1 + raised)
    assert cases == 300
    assert apportion(10, np.array([5, 5]), np.array([2, 3])).tolist() == [2, 3]


def test_drop_repeats_against_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        groups, codes = rng.integers(0, 20, 60), rng.integers(0, 2, 60).astype(np.int32)
        roles = rng.integers(-1, 3, 60).astype(np.int8)
        kept, duplicates, conflicts = drop_repeats(roles, groups, codes)
        train = [i for i in range(60) if roles[i] == 0]
        for i in range(60):
            same = [j for j in train if groups[j] == groups[i]]
            keep = i in train and same[0] == i and len({codes[j] for j in same}) == 1
            assert kept[i] == (0 if keep else DROPPED) if i in train else kept[i] == roles[i]
        assert duplicates + conflicts == len(train) - int(np.sum(kept == 0))
        apart, _ = drop_leaks(kept, groups)
        in_split = [set(groups[apart == role].tolist()) for role in range(3)]
        assert not in_split[0] & (in_split[1] | in_split[2])
        assert not in_split[1] & in_split[2]
        assert np.array_equal(apart == 2, roles == 2)  # the test split is never touched


def test_labels_become_codes_in_an_order_of_their_own() -> None:
    labels = pa.chunked_array([["b", None, " a "], ["", "b", "c"]])
    codes, names = code_labels(labels)
    assert names == ["a", "b", "c"]
    assert codes.tolist() == [1, -1, 0, -1, 1, 2]
    codes, names = code_labels(pa.chunked_array([["10", "9.0", "-1", "9", "09"]]))
    assert names == ["-1", "09", "9", "10"]
    assert codes.tolist() == [3, 2, 0, 2, 1]


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    # From the reference implementation of SplitMix64 (java.util.SplittableRandom): seed 0, first numbers.
    zero = np.zeros((1, 2), np.uint64)
    assert shuffle_key(zero, 0).tolist() == [0xE220A8397B1DCDAF]
    assert shuffle_key(zero, 1).tolist() == [0x6E789E6AA1B965F4]
    assert shuffle_key(zero, -7).tolist() != shuffle_key(zero, 7).tolist()
    keys = np.arange(2000, dtype=np.uint64).reshape(1000, 2)
    assert len(set(shuffle_key(keys, 3).tolist())) == 1000


def test_a_limit_takes_the_first_of_each_class_in_the_order_given() -> None:
    roles, codes = np.zeros(8, np.int8), np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    order = np.array([3, 1, 2, 0, 5, 4, 7, 6], np.uint64)
    assert np.flatnonzero(limit(roles, 0, 4, codes, order) == 0).tolist() == [1, 3, 4, 5]
