"""Events as sequences: what is held out, how ranks are counted, and that nothing from the future is seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tables import plays, write_csv
from toolkit.compute import fuse_loss, remove_padding
from toolkit.config import EventsConfig, NextItemNetworkConfig
from toolkit.data.tables import Catalogue, Events, events
from toolkit.errors import DataError
from toolkit.networks.next_item import GPT2ForNextItem, next_item_network
from toolkit.tasks import NextItem
from toolkit.tasks.next_item import rank_of

HEADER = ("user", "item", "timestamp")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def read(path: Path, **settings: Any) -> Events:
    return events(EventsConfig(name=str(path), **settings))


def named(data: Events, numbers: list[int]) -> list[str]:
    return [data.catalogue.items[number - 1] for number in numbers]


def test_the_last_item_is_the_test_and_the_one_before_the_validation(tmp_path: Path) -> None:
    rows = [["ann", item, moment] for item, moment in (("e", 50), ("a", 10), ("c", 30), ("d", 40), ("b", 20))]
    rows += [["bob", item, 7] for item in "abcde"]  # at one moment: in the order of the rows
    rows += [["eve", "a", 1], ["eve", "b", 2]]  # too few
    rows += [["bob", "a", 7]]  # a repeat
    data = read(write_csv(tmp_path / "events.csv", HEADER, rows))
    for role, seen, target in (("validation", "abc", "d"), ("test", "abcd", "e")):
        split = getattr(data, role)
        assert [named(data, items) for items in split["items"]] == [list(seen)] * 2
        assert split["items"][:] == split["seen"][:]
        assert named(data, split["target"]) == [target] * 2
    assert [named(data, items) for items in data.train["items"]] == [["a", "b", "c"]] * 2
    assert data.train["target"][:] == [0, 0]
    assert dict(zip(data.catalogue.items, data.catalogue.counts, strict=True)) == {
        "a": 2,
        "b": 2,
        "c": 2,
        "d": 0,
        "e": 0,
    }
    assert data.facts["dropped"] == {"unfit": 0, "repeated": 1, "of rare items": 0, "of users with few": 2}
    assert data.facts["untrained_items"] == 2


def test_long_histories_are_several_samples(tmp_path: Path) -> None:
    rows = [["ann", f"i{n:02}", f"2024-01-{n:02}"] for n in range(1, 14)]
    data = read(write_csv(tmp_path / "events.csv", HEADER, rows), max_length=4)
    pieces = [named(data, items) for items in data.train["items"]]
    assert pieces == [[f"i{n:02}" for n in range(*ends)] for ends in ((7, 12), (3, 8), (1, 4))]
    assert sorted(item for piece in pieces for item in piece[1:]) == [f"i{n:02}" for n in range(2, 12)]  # each once
    assert named(data, data.test["items"][0]) == ["i09", "i10", "i11", "i12"]
    assert len(data.test["seen"][0]) == 12


def test_what_is_refused(tmp_path: Path) -> None:
    good = [["ann", n, n] for n in range(6)]
    for rows, settings, said in (
        ([*good, ["bob", "", 3]], {"max_bad_rows": 0}, "row 7 of .*events.csv: it has no item"),
        ([*good * 20, ["bob", 3, "soon"]], {"max_bad_rows": 0}, "row 121 of .*events.csv: its timestamp is 'soon'"),
        ([["ann", n, f"day {n}"] for n in range(6)], {}, "holds neither numbers nor dates"),
        (good, {"min_events": 9}, "has no user with 9 events"),
        (good, {"item": "song"}, "has no column 'song'"),
        (good, {"title": "name"}, "has no column 'name'"),
    ):
        path = write_csv(tmp_path / "events.csv", HEADER, rows)
        with pytest.raises(DataError, match=said):
            read(path, **settings)


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[9.0, 1.0, 4.0, 3.0, 3.0], [9.0, 5.0, 5.0, 5.0, 5.0]])  # item 0 is padding
    nothing = torch.empty(2, 0, dtype=torch.long)
    assert rank_of(scores, torch.tensor([3, 1]), nothing).tolist() == [3, 4]  # what is alike comes before
    seen = torch.tensor([[0, 0, 1, 1], [2, 4, 1, 2]])
    assert rank_of(scores, torch.tensor([3, 1]), seen).tolist() == [1, 3]  # the target is never passed over


def test_figures_add_up_and_popularity_is_ranked_alike() -> None:
    catalogue = Catalogue(tuple("abcdefghijkl"), tuple("abcdefghijkl"), (50, 40, 30, *range(9)), exclude_seen=True)
    task = NextItem(catalogue)
    rows = {
        "items": [[1, 2], [3, 4, 5], [4]],
        "target": [3, 12, 1],
        "seen": [[1, 2], [3, 4, 5], [4]],
        "length": [2, 3, 1],
        "id": [0, 1, 2],
    }
    whole = task.collate(rows, False)
    assert whole.inputs["last"].tolist() == [1, 2, 0]
    scores = torch.randn(3, 13, generator=torch.Generator().manual_seed(3))
    counts = task.measure(SimpleNamespace(logits=scores), whole)
    parts = [{name: column[n : n + 1] for name, column in rows.items()} for n in range(3)]
    single = [task.measure(SimpleNamespace(logits=scores[n : n + 1]), task.collate(parts[n], False)) for n in range(3)]
    for name, count in counts.items():
        assert sum(one[name] for one in single) == pytest.approx(count)
    filler = task.measure(SimpleNamespace(logits=scores), task.collate(rows, True))
    assert not any(bool(count.any()) for count in filler.values())
    popular = task.metrics(counts)["popularity"]
    # c is first where a and b were seen; l, counted 8 times, is third behind a and b where c was; a is the first.
    assert popular["mrr"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert popular["ndcg_at_10"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert popular["hit_rate_at_10"] == 1


@pytest.fixture
def network() -> GPT2ForNextItem:
    sizes = NextItemNetworkConfig(hidden_size=16, dropout=0.0)
    return next_item_network(sizes, 20, 16, seed=0).eval()


def test_neither_the_future_nor_padding_is_seen(network: GPT2ForNextItem) -> None:
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        scores = network(input_ids=ids, attention_mask=mask).logits
        later = network(input_ids=torch.tensor([[3, 5, 7, 2, 4]]), attention_mask=mask).logits
        padded = network(
            input_ids=torch.tensor([[3, 5, 7, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
        ).logits
        last = network(input_ids=ids, attention_mask=mask, last=torch.tensor([2])).logits
    for other in (later[:, :3], padded[:, :3]):
        assert torch.allclose(scores[:, :3], other, atol=1e-6)
    assert not torch.allclose(scores[:, 3], later[:, 3], atol=1e-3)
    assert torch.allclose(scores[:, 2], last, atol=1e-6)


def test_the_loss_without_logits_or_padding_is_that_with_them(network: GPT2ForNextItem) -> None:
    catalogue = Catalogue(tuple(map(str, range(20))), tuple(map(str, range(20))), (1,) * 20, exclude_seen=True)
    rows: dict[str, Any] = {"items": [[1, 2, 3, 4], [5, 6]], "target": [0, 0], "seen": [[], []], "id": [0, 1]}
    plain = NextItem(catalogue)
    batch = plain.collate(rows, False)
    assert batch.labels.tolist() == [[2, 3, 4], [6, -100, -100]]
    assert plain.units(batch) == 4
    assert plain.units(plain.collate(rows, True)) == 0
    expected = plain.loss(network(**batch.inputs), batch)
    assert [fuse_loss(network), remove_padding(network)] == ["", ""]
    lean = NextItem(catalogue, fused=True)
    batch = lean.collate(rows, False)
    assert float(lean.loss(network(**batch.inputs), batch)) == pytest.approx(float(expected), rel=1e-5)
    evaluated = rows | {"target": [7, 8], "seen": [[1], [5]]}
    batch = lean.collate(evaluated, False)
    assert network(**batch.inputs).logits.shape == (2, 21)


def test_the_order_of_rows_does_not_matter_but_at_one_moment(tmp_path: Path) -> None:
    rows = plays(12, 9)
    first, second = (read(write_csv(tmp_path / f"{n}.csv", HEADER, r)) for n, r in enumerate((rows, rows[::-1])))
    assert sorted(map(str, first.test["items"])) == sorted(map(str, second.test["items"]))
    assert first.catalogue == second.catalogue
