"""Real digits as files, for tests of what reads images."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from toolkit.samples import fetch


def digits(each: int, classes: str = "0123") -> list[tuple[bytes, str]]:
    """PNG files and labels: so many of each digit."""
    return [row for digit in classes for row in [row for row in _all_digits() if row[1] == digit][:each]]


@functools.cache
def _all_digits() -> list[tuple[bytes, str]]:
    table = pq.read_table(fetch("mnist") / "data.parquet").to_pylist()
    return [(row["image"]["bytes"], row["label"]) for row in table]


def write_folder(folder: Path, rows: list[tuple[bytes, str]]) -> Path:
    """A folder of files for each class."""
    for number, (data, label) in enumerate(rows):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:04}.png").write_bytes(data)
    return folder


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
