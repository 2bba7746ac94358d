"""Tables of samples: measurements and events, an object a row, with the values as they were."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.samples._converters import ROWS_FILE


def diamonds(unpacked: Path, target: Path) -> None:
    """A diamond a row, in file order: words as words, measurements as numbers."""
    with (unpacked / "plotnine" / "data" / "diamonds.csv").open(encoding="utf-8", newline="") as file:
        _write(target, ({name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)))


def movielens(unpacked: Path, target: Path) -> None:
    """A rating a row, in file order: `user` and `item` (words), `rating`, `timestamp` (seconds), and the film."""
    (source,) = unpacked.glob("recbole/dataset_example/ml-100k")
    films = {
        film["item_id:token"]: f"{film['movie_title:token_seq']} ({film['release_year:token']})"
        for film in _atoms(source / "ml-100k.item")
    }
    _write(
        target,
        (
            {
                "user": event["user_id:token"],
                "item": event["item_id:token"],
                "rating": int(event["rating:float"]),
                "timestamp": int(event["timestamp:float"]),
                "title": films[event["item_id:token"]],
            }
            for event in _atoms(source / "ml-100k.inter")
        ),
    )


def _atoms(path: Path) -> Iterable[dict[str, str]]:
    """The rows of an atomic file of RecBole: fields between tabs, named and typed in the first line."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _value(cell: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _write(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
