"""Tables from files, each cell as the words that stand for it: so one rule reads them all, and predictions later."""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.csv as pa_csv  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from toolkit import samples
from toolkit.data.files import Part, check_lines, open_file
from toolkit.data.sources import file_digest, find_part
from toolkit.errors import DataError, nearest

_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class RawTable:
    """Cells as words.

    Attributes:
        cells: columns of strings; null where a cell is not there.
        begins: first row of each file, and its name.
    """

    cells: pa.Table
    begins: tuple[tuple[int, str], ...]

    def where(self, row: int) -> str:
        """A row's number in its file, from 1 and without a header."""
        begin, name = self.begins[bisect_right([first for first, _ in self.begins], row) - 1]
        return f"row {row - begin + 1} of {name}"

    def require(self, column: str, key: str) -> None:
        """Raises DataError where there is no such column."""
        names = self.cells.column_names
        if column not in names:
            there = ", ".join(f"'{name}'" for name in names[:20]) + (" …" if len(names) > 20 else "")
            raise DataError(
                f"{self.begins[0][1]} has no column '{column}'; it has {there}.{nearest(column, names)}",
                f"Name it with {key}. The first line of a CSV or TSV file must name its columns.",
            )


def find_tables(name: str, key: str) -> Part:
    """The files of a table.

    Raises:
        ConfigError, DataError: there are none, or of no kind that is a table.
    """
    if name.startswith("sample:"):
        return Part("jsonl", (samples.fetch(name.removeprefix("sample:")) / "data.jsonl",))
    part = find_part(name, key)
    if part.kind == "text":
        raise DataError(f"{key} {name} holds plain texts, no table", "Give CSV, TSV, JSONL, JSON or Parquet.")
    return part


def digest_of(part: Part) -> list[str]:
    """What identifies the content of the files."""
    return [part.kind, *map(file_digest, part.files)]


def read_tables(parts: Sequence[Part]) -> tuple[RawTable, list[int]]:
    """The tables of several places, below one another, and how many rows each place has.

    Raises:
        DataError: a file cannot be read, is ragged, or has other columns than the first.
    """
    tables: list[pa.Table] = []
    begins: list[tuple[int, str]] = []
    sizes, rows = [], 0
    for part in parts:
        before = rows
        for file in part.files:
            found = _read(file, part.kind)
            if not found.num_rows:
                raise DataError(f"{file} has no rows", "Remove the file or fill it.")
            if tables and set(found.column_names) != set(tables[0].column_names):
                names = sorted(set(found.column_names) ^ set(tables[0].column_names))
                raise DataError(
                    f"{file} and {begins[0][1]} have other columns: {', '.join(names[:5])} stand in one of them",
                    "Give them the same.",
                )
            tables.append(found.select(tables[0].column_names) if tables else found)
            begins.append((rows, str(file)))
            rows += found.num_rows
        sizes.append(rows - before)
    return RawTable(pa.concat_tables(tables), tuple(begins)), sizes


def word(value: Any) -> str | None:
    """The words that stand for a value of JSON, as a cell of a CSV file would have them; None for null.

    Raises:
        TypeError: a list or an object.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"{json.dumps(value, ensure_ascii=False)[:40]} is a {type(value).__name__}, not one value")


def _read(file: Path, kind: str) -> pa.Table:
    if kind == "parquet":
        return _read_parquet(file)
    if kind in ("csv", "tsv"):
        return _read_csv(file, "," if kind == "csv" else "\t")
    return _read_json(file, _documents(file) if kind == "json" else _json_lines(file))


def _read_csv(file: Path, delimiter: str) -> pa.Table:
    header: list[str] = []
    rows = check_lines(file, delimiter, header.extend)  # which names the line that is ragged, or not UTF-8
    if repeated := {name for name in header if header.count(name) > 1}:
        raise DataError(f"{file} has several columns '{sorted(repeated)[0]}'", "Give each a name of its own.")
    try:
        with open_file(file) as stream:
            table = pa_csv.read_csv(
                stream,
                parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
                ),
            )
    except pa.ArrowException as error:
        raise DataError(f"{file} cannot be read: {error}", "Write it again with a CSV library, or as JSONL.") from error
    if table.num_rows != rows:
        raise DataError(
            f"{file} has {rows} rows by one reading and {table.num_rows} by another: its quotes do not pair up",
            "Write it again with a CSV library, or as JSONL.",
        )
    return table


def _read_parquet(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file: {str(error).splitlines()[0]}", "Write it again.") from error
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_nested(column.type):
            raise DataError(f"column '{name}' of {file} holds lists or objects", "Take it out, or one value of each.")
        columns[name] = pc.cast(column, pa.string())
    return pa.table(columns)


def _read_json(file: Path, rows: Iterator[tuple[str, Any]]) -> pa.Table:
    """The columns of all rows: a row that lacks one has null there."""
    tables: list[pa.Table] = []
    some: list[dict[str, str | None]] = []
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object", 'Each row is {"column": value, …}.')
        try:
            some.append({name: word(value) for name, value in row.items()})
        except TypeError as error:
            raise DataError(f"{where}: {error}", "Write one word or number in each column.") from error
        if len(some) == _ROWS_AT_ONCE:
            tables.append(_of_rows(some))
            some = []
    tables += [_of_rows(some)] if some else []
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def _of_rows(rows: Sequence[Mapping[str, str | None]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with open_file(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{file}, line {number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # of Unicode too
                raise DataError(f"{file}, line {number}: not JSON ({error})", "Mend this line or remove it.") from error


def _documents(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open_file(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            rows = json.load(stream)
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})", "Mend it or write the file again.") from error
    if not isinstance(rows, list):
        raise DataError(f"{file} holds a {type(rows).__name__}, not a list of rows", "Write [{…}, {…}].")
    yield from ((f"row {number} of {file}", row) for number, row in enumerate(rows, start=1))
