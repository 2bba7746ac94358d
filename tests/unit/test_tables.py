"""Tables: how columns are read, what is learnt of the training rows alone, how rows are parted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.preprocessing import QuantileTransformer

from tests.tables import COLUMNS, TOWNS, houses, write_csv
from toolkit.config import TableConfig, TableNetworkConfig
from toolkit.data.tables import Preprocessor, TableData, table
from toolkit.data.tables.preprocess import ABSENT, UNKNOWN
from toolkit.data.tables.target import fit_scale
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.networks import architecture
from toolkit.networks.tables import table_network
from toolkit.tasks import TableClassification, TableRegression

ROWS = houses(200)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "houses.csv", COLUMNS, ROWS)


def read(file: Path, **settings: Any) -> TableData:
    return table(TableConfig(**({"name": str(file), "target": "price"} | settings)))


def ids(data: TableData) -> dict[str, set[int]]:
    return {role: set(getattr(data, role)["id"]) for role in ("train", "validation", "test")}


def cells(rows: list[list[Any]], names: tuple[str, ...] = COLUMNS) -> dict[str, Any]:
    columns = zip(*rows, strict=True)
    return {name: pa.array([None if v is None else str(v) for v in column], pa.string())
            for name, column in zip(names, columns, strict=True)}  # fmt: skip


# How columns are read.


def test_kinds_are_found(file: Path) -> None:
    data = read(file)
    assert data.preprocessor.kinds == {
        "rooms": "numeric",
        "area": "numeric",
        "garden": "boolean",
        "town": "categorical",
        "sold": "date",
    }
    assert data.facts["left_out"] == {"note": "another word in almost every row"}
    parts = [number.name for number in data.preprocessor.numbers if number.column == "sold"]
    assert parts == ["sold year", "sold month", "sold day", "sold weekday", "sold days"]  # all at midnight: no hour
    assert data.preprocessor.categories == {"town": TOWNS[:2] + TOWNS[3:] + TOWNS[2:3]}
    assert data.preprocessor.scale is not None


def test_kinds_can_be_given(file: Path) -> None:
    data = read(file, categorical=("rooms",), drop=("sold",), numeric=("area",))
    assert data.preprocessor.kinds["rooms"] == "categorical"
    assert data.facts["left_out"]["sold"] == "as asked"
    assert len(data.preprocessor.categories["rooms"]) == 8


def test_words_and_few_whole_numbers_are_classes(file: Path) -> None:
    assert read(file, target="town").preprocessor.labels == tuple(sorted(TOWNS))
    assert read(file, target="rooms").preprocessor.labels == tuple("12345678")
    assert read(file, target="rooms", task="regression").preprocessor.labels == ()


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "json", "parquet"])
def test_all_kinds_of_files_say_the_same(kind: str, file: Path, tmp_path: Path) -> None:
    other = tmp_path / f"other.{kind}"
    objects = [dict(zip(COLUMNS, row, strict=True)) | {"garden": row[2] == "yes"} for row in ROWS]
    if kind == "tsv":
        other.write_text("\n".join("\t".join(map(str, row)) for row in [COLUMNS, *ROWS]), encoding="utf-8")
    elif kind == "jsonl":
        other.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in objects), encoding="utf-8")
    elif kind == "json":
        other.write_text(json.dumps(objects), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(objects), other)
    held = {role: str(write_csv(tmp_path / f"{role}.csv", COLUMNS, houses(20, seed)))
            for seed, role in enumerate(("validation", "test"), start=1)}  # fmt: skip
    first, second = (read(path, **held, drop=("garden",)) for path in (file, other))
    assert first.train[:] == second.train[:]
    assert first.preprocessor == second.preprocessor


# What is learnt of the training rows.


def test_nothing_is_learnt_of_held_out_rows(file: Path, tmp_path: Path) -> None:
    """A test of other towns, other ranges and other prices changes nothing of how rows are read."""
    wild = [[99, 1e6, "no", "Nowhere", "1900-01-01", "x", 10**9], *houses(40, 2)]
    held = [houses(40, 1), houses(40, 3), wild, [[*row[:3], "Elsewhere", *row[4:]] for row in houses(40, 4)]]
    paths = [str(write_csv(tmp_path / f"{n}.csv", COLUMNS, rows)) for n, rows in enumerate(held)]
    one, other = (read(file, test=paths[n], validation=paths[n + 1]) for n in (0, 2))
    assert one.preprocessor == other.preprocessor
    assert one.train[:] == other.train[:]
    of_training = [ROWS[number] for number in sorted(ids(one)["train"])]
    area = np.array([row[1] for row in of_training])
    number = next(number for number in one.preprocessor.numbers if number.name == "area")
    assert (number.fill, number.mean) == (pytest.approx(np.median(area)), pytest.approx(area.mean()))
    logs = np.log1p([row[-1] for row in of_training])
    scale = read(file, test=paths[0], validation=paths[1], target_transform="log1p").preprocessor.scale
    assert scale is not None
    assert (scale.mean, scale.deviation) == (pytest.approx(logs.mean()), pytest.approx(logs.std()))


def test_split_off_rows_are_not_learnt_of_either(file: Path) -> None:
    data = read(file, scaling="standard")
    values = np.array([ROWS[number][1] for number in data.train["id"]])
    place = [number.name for number in data.preprocessor.numbers].index("area")
    found = np.array(data.train["numbers"])[:, place]
    assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert found == pytest.approx((values - values.mean()) / values.std(), abs=1e-5)
    assert abs(np.array(data.test["numbers"])[:, place].mean()) > 1e-4


def test_ranks_are_those_of_scikit_learn(file: Path) -> None:
    data = read(file)
    place = [number.name for number in data.preprocessor.numbers].index("rooms")  # with many ties
    rooms = {role: np.array([[float(ROWS[n][0])] for n in getattr(data, role)["id"]]) for role in ("train", "test")}
    theirs = QuantileTransformer(n_quantiles=1001, output_distribution="normal").fit(rooms["train"])
    inner = (rooms["test"] > 1) & (rooms["test"] < 8)  # where the ends lie is a matter of taste
    expected = theirs.transform(rooms["test"])[inner]
    assert np.array(data.test["numbers"])[:, [place]][inner] == pytest.approx(expected, abs=0.02)


def test_raw_values_are_read_as_in_training_from_plain_json(file: Path, tmp_path: Path) -> None:
    data = read(file)
    data.preprocessor.save_pretrained(tmp_path)
    json.loads((tmp_path / "table.json").read_text(), parse_constant=lambda word: pytest.fail(word))  # no NaN
    again = Preprocessor.from_pretrained(tmp_path)
    assert again == data.preprocessor
    encoded = again.encode(cells([ROWS[number] for number in data.test["id"]]))
    assert encoded.numbers == pytest.approx(np.array(data.test["numbers"], np.float32))
    assert encoded.categories.tolist() == data.test["categories"][:]


def test_empty_and_unknown_cells(tmp_path: Path) -> None:
    rows = [[*row] for row in ROWS]
    for row in rows[::10]:
        row[1], row[3] = "", "NA"
    data = read(write_csv(tmp_path / "gaps.csv", COLUMNS, rows), drop=("sold", "note"))
    assert data.facts["missing"]["area"] == sum(number % 10 == 0 for number in ids(data)["train"])
    reading = data.preprocessor
    names = [name for number in reading.numbers for name in (number.name, *(["mark"] if number.marked else []))]
    assert names == ["rooms", "area", "mark", "garden"]
    area = next(number for number in reading.numbers if number.name == "area")
    gap = reading.encode(cells([[3, None, "no", None, "", "", 0], [3, area.fill, "no", "Paris", "", "", 0]]))
    assert gap.numbers[0, 1] == gap.numbers[1, 1]
    assert gap.numbers[:, 2].tolist() == [1, 0]
    assert gap.categories.tolist() == [[ABSENT], [UNKNOWN]]
    assert gap.missing.tolist() == [True, False]
    dropped = read(tmp_path / "gaps.csv", missing="drop")
    assert dropped.facts["dropped"]["with an empty cell"] == 20
    assert not any(number % 10 == 0 for found in ids(dropped).values() for number in found)


def test_rare_categories_teach_what_is_unknown(tmp_path: Path) -> None:
    rows = [[*row] for row in ROWS]
    rows[5][3] = rows[6][3] = rows[7][3] = "Elba"
    data = read(write_csv(tmp_path / "rare.csv", COLUMNS, rows), train_rows=None, test_share=0.05)
    assert "Elba" not in data.preprocessor.categories["town"]
    assert any(found == [UNKNOWN] for found in data.train["categories"])


def test_outliers_are_told_moved_or_dropped(tmp_path: Path) -> None:
    rows = [[*row] for row in ROWS]
    rows[3][1] = rows[4][1] = 5000
    path = write_csv(tmp_path / "far.csv", COLUMNS, rows)
    kept = read(path)
    train = ids(kept)["train"]
    far = len({3, 4} & train)
    assert far
    area = next(number for number in kept.preprocessor.numbers if number.name == "area")
    values = np.array([rows[number][1] for number in train], float)
    low, high = np.quantile(values, 0.25), np.quantile(values, 0.75)
    assert area.fences == pytest.approx((low - 3 * (high - low), high + 3 * (high - low)))
    assert kept.facts["outliers"] == {"area": far}
    clipped = read(path, outliers="clip").preprocessor
    both = clipped.encode(cells([rows[3], [*rows[3][:1], area.fences[1], *rows[3][2:]]])) if area.fences else None
    assert both is not None
    assert both.numbers[0].tolist() == both.numbers[1].tolist()
    dropped = read(path, outliers="drop")
    assert ids(dropped)["train"] == train - {3, 4}
    assert ids(dropped)["test"] == ids(kept)["test"]


def test_the_target_is_brought_back_to_its_units() -> None:
    skewed = np.exp(np.random.default_rng(0).normal(8, 1.5, 500))
    scale = fit_scale(skewed, "auto")
    assert scale.transform == "log1p"
    assert scale.units(scale.learnt(torch.tensor(skewed))).numpy() == pytest.approx(skewed, rel=1e-9)
    assert math.isfinite(float(scale.units(torch.tensor(1e9))))
    assert fit_scale(np.arange(50.0), "auto").transform == "none"
    assert fit_scale(-skewed, "auto").transform == "none"
    with pytest.raises(ValueError, match="has no logarithm"):
        fit_scale(-skewed, "log1p")


# How rows are parted.


def test_shares_and_order_do_not_depend_on_the_rows_places(file: Path, tmp_path: Path) -> None:
    data = read(file)
    assert {role: len(found) for role, found in ids(data).items()} == {"train": 160, "validation": 20, "test": 20}
    back = read(write_csv(tmp_path / "back.csv", COLUMNS, ROWS[::-1]))
    assert ids(data)["test"] == {199 - number for number in ids(back)["test"]}
    assert ids(data)["test"] != ids(read(file, split_seed=1))["test"]
    assert ids(read(file, train_rows=50))["train"] < ids(read(file, train_rows=90))["train"]


@pytest.mark.parametrize("by", ["content", "group"])
def test_folds_leak_nothing(by: str, tmp_path: Path) -> None:
    """Each row is tested once, and neither equal rows nor a group are ever on two sides."""
    rows = [[*row, f"owner {number % 23}"] for number, row in enumerate(ROWS)]
    rows += rows[:30]
    path = write_csv(tmp_path / "folds.csv", (*COLUMNS, "owner"), rows)
    side = [row[-1] if by == "group" else tuple(row) for row in rows]
    tested: Counter[int] = Counter()
    for fold in range(5):
        found = ids(read(path, folds=5, fold=fold, group="owner" if by == "group" else None))
        assert sum(map(len, found.values())) == len(rows)
        on_sides = [{side[number] for number in numbers} for numbers in found.values()]
        assert not any(on_sides[a] & on_sides[b] for a, b in ((0, 1), (0, 2), (1, 2)))
        tested.update(found["test"])
        assert 20 < len(found["test"]) < 80
    assert set(tested) == set(range(len(rows)))
    assert set(tested.values()) == {1}


def test_classes_keep_their_shares(tmp_path: Path) -> None:
    rows = [[number, "rare" if number % 10 == 0 else "usual"] for number in range(300)]
    path = write_csv(tmp_path / "classes.csv", ("n", "kind"), rows)
    data = read(path, target="kind")
    for counts in data.facts["counts"].values():
        assert counts["rare"] / sum(counts.values()) == pytest.approx(0.1, abs=0.02)
    assert data.preprocessor.labels == ("rare", "usual")


def test_rows_that_are_tested_on_are_not_trained_on(file: Path, tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", COLUMNS, [*ROWS[:7], *houses(20, 3)])
    data = read(file, test=str(test))
    assert data.facts["dropped"]["in a held-out split"] == 7
    assert not ids(data)["train"] & set(range(7))


# What is refused.


REFUSED: list[tuple[str, list[list[Any]], dict[str, Any], str]] = [
    ("ragged", [[1, 2, 3], [1, 2], [4, 5, 6]], {}, "bad.csv, line 3: 2 fields, where the header names 3"),
    ("no target", [[n, n, ""] for n in range(200)], {}, "row 1 of {file}: it has no y"),
    ("NaN target", [[n, n, "nan" if n % 2 else n + 0.5] for n in range(400)], {}, "row 2 of {file}: it has no y"),
    (
        "word for a number",
        [["many" if n % 30 == 7 else n, n, n + 0.5] for n in range(400)],
        {"max_bad_rows": 3},
        "row 8 of {file}: 'a' is 'many', not a number",
    ),
    (
        "word for a target",
        [[n, n, "dear" if n == 11 else n + 0.5] for n in range(400)],
        {"max_bad_rows": 0},
        "row 12 of {file}: its y is 'dear', not a number",
    ),
    (
        "class missing from a fold",
        [[n, n, "only" if n == 5 else f"c{n % 3}"] for n in range(90)],
        {"folds": 2, "fold": 1},
        "class 'only' of y is in the test split but not in training, as row 6 of {file}",
    ),
    ("no column", [[1, 2, 3]], {"target": "z"}, "has no column 'z'; it has 'a', 'b', 'y'"),
    ("unknown kind", [[n, n, n] for n in range(99)], {"categorical": ("c",)}, "--data.categorical c: no such column"),
    ("two kinds", [[n, n, n] for n in range(99)], {"dates": ("a",), "numeric": ("a",)}, "column 'a' is given two"),
    ("constant", [[n, n, 0.5] for n in range(99)], {"task": "regression"}, "all of them are 0.5"),
    ("fold alone", [[1, 2, 3]], {"fold": 1}, "--data.fold 1 has no effect without --data.folds"),
    ("no such fold", [[1, 2, 3]], {"folds": 3, "fold": 3}, "--data.fold 3 is none of 3 folds"),
    ("group and strata", [[1, 2, 3]], {"group": "a", "split": "stratified"}, "has no effect beside --data.group"),
    ("log of classes", [[n, n, f"c{n % 3}"] for n in range(90)], {"target_transform": "log1p"}, "has no effect on the"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "settings", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_refused(name: str, rows: list[list[Any]], settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "bad.csv", ("a", "b", "y"), rows)
    with pytest.raises(ToolkitError) as caught:
        read(path, **({"target": "y"} | settings))
    assert said.format(file=path) in str(caught.value)
    assert caught.value.remedy


def test_rows_of_json_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for text, said in (('{"a": 1}\n[2]', "line 2: a list"), ('{"a": 1}\n{"a": ', "line 2: not JSON"),
                       ('{"a": {"b": 1}}', "line 1"), ("", "has no rows")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            read(path)


def test_a_few_unfit_rows_are_left_out_and_told(tmp_path: Path) -> None:
    rows = [["many" if n == 7 else n, n * 1.5, "" if n == 9 else n + 0.5] for n in range(400)]
    data = read(write_csv(tmp_path / "few.csv", ("a", "b", "y"), rows), target="y")
    assert data.facts["dropped"]["unfit"] == 2
    assert "2 unfit rows are left out" in data.facts["warnings"][0]
    assert not any({7, 9} & found for found in ids(data).values())


# The task.


def test_figures_are_those_of_scikit_learn_however_rows_are_dealt(file: Path) -> None:
    data = read(file)
    task = TableRegression(data.preprocessor)
    rows = data.train[:]
    answers = torch.randn(len(rows["id"]), 1, generator=torch.Generator().manual_seed(0))
    counts: dict[str, torch.Tensor] = {}
    for start in range(0, len(answers), 50):
        part = slice(start, start + 50)
        batch = task.collate({name: column[part] for name, column in rows.items()}, False)
        for name, count in task.measure(SimpleNamespace(logits=answers[part]), batch).items():
            counts[name] = counts.get(name, torch.zeros(())) + count
    filler = task.collate({name: column[:3] for name, column in rows.items()}, True)
    for name, count in task.measure(SimpleNamespace(logits=answers[:3]), filler).items():
        counts[name] = counts[name] + count
    found = task.metrics(counts)
    true, predicted = np.array(rows["target"]), task.scale.units(answers.squeeze(1)).numpy()
    assert found["r2"] == pytest.approx(r2_score(true, predicted))
    assert found["mae"] == pytest.approx(mean_absolute_error(true, predicted))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(true, predicted))
    assert found["pearson"] == pytest.approx(pearsonr(true, predicted)[0])
    assert found["units"] == len(true) == np.sum(found["answers"]["grid"])
    error = np.array(found["answers"]["error"]) * np.sum(found["answers"]["grid"], 0)
    assert error.sum() == pytest.approx((predicted - true).sum())
    assert task.loss(SimpleNamespace(logits=answers[:3]), filler) == 0
    for broken in ({"target": math.nan}, {"numbers": [math.inf] * task.preprocessor.number_count},
                   {"categories": [99]}):  # fmt: skip
        row = {name: column[0] for name, column in rows.items()}
        assert not task.problem(row)
        assert task.problem(row | broken)


@pytest.mark.parametrize("kind", ["mlp", "ft_transformer"])
def test_a_network_is_drawn_from_its_seed_and_loads_again(kind: Any, tmp_path: Path) -> None:
    config = TableNetworkConfig(architecture=kind, hidden_size=16)
    model, same, other = (table_network(config, 3, (4, 5), 2, seed=seed).eval() for seed in (1, 1, 2))
    inputs = {"numbers": torch.randn(6, 3), "categories": torch.tensor([[2, 3]] * 6)}
    answers = model(**inputs).logits
    assert answers.shape == (6, 2)
    assert torch.equal(answers, same(**inputs).logits)
    assert not torch.equal(answers, other(**inputs).logits)
    model.save_pretrained(tmp_path)
    again, report = architecture(type(model).__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(answers, again.eval()(**inputs).logits)
    # What training does not know is neutral before it is learnt.
    assert not model.categories.tables["0"].weight[:2].any()
    with pytest.raises(ConfigError, match="has no effect on"):
        table_network(dataclasses.replace(config, heads=2, architecture="mlp"), 3, (), 1, seed=0)


def test_classes_are_measured_as_any_are(file: Path) -> None:
    data = read(file, target="town")
    task = TableClassification(data.preprocessor)
    rows = data.test[:]
    batch = task.collate(rows, False)
    logits = torch.nn.functional.one_hot(batch.labels, 4).float()
    assert task.metrics(task.measure(SimpleNamespace(logits=logits), batch))["accuracy"] == 1
    assert not task.problem({name: column[0] for name, column in rows.items()})
    assert "not among the 4 classes" in task.problem({name: column[0] for name, column in rows.items()} | {"target": 4})
