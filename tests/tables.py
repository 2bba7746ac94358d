"""Small tables and events on disk, made from a seed, that recipes read as they read a user's own."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("rooms", "area", "garden", "town", "sold", "note", "price")
TOWNS = ("Ahlen", "Bonn", "成都", "Deal")


def houses(count: int, seed: int = 0) -> list[list[Any]]:
    """Rows of `COLUMNS`: numbers, yes or no, a category, a date, a word that differs in each row, and the price."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        rooms, area, garden, town = rng.randint(1, 8), round(rng.uniform(20, 200), 1), rng.random() < 0.4, number % 4
        price = 1000 * (3 * area + 40 * rooms + 90 * garden + 50 * town) * rng.uniform(0.97, 1.03)
        sold = f"{rng.randint(2001, 2020)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        rows.append([rooms, area, "yes" if garden else "no", TOWNS[town], sold, f"note {seed} {number}", round(price)])
    return rows


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def plays(users: int, items: int, seed: int = 0) -> list[list[Any]]:
    """Rows of user, item and time: from each item one goes on to the next, mostly."""
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        item = rng.randrange(items)
        for moment in range(rng.randint(6, 14)):
            rows.append([f"u{user}", f"i{item}", 1000 + moment])
            item = (item + 1) % items if rng.random() < 0.9 else rng.randrange(items)
    rng.shuffle(rows)
    return rows
