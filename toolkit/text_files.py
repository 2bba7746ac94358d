"""Texts from files and streams, each fault told with its line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from toolkit.errors import DataError, nearest

FILE_TYPES = (".txt", ".csv", ".tsv", ".jsonl")
"""Those that `read_texts` reads."""


def read_texts(file: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file, one after the other.

    Args:
        file: one text a line (.txt), or a table with a header (.csv, .tsv), or JSON objects (.jsonl).
        column: where the texts are; not for .txt.

    Raises:
        DataError: the file cannot be read, is malformed or not UTF-8, lacks the column, or has an empty text.
    """
    for where, row in _rows(file, column):
        value = row[column]
        if not isinstance(value, str | None):
            raise DataError(
                f"{where}: '{column}' is {json.dumps(value)[:40]}, not a text",
                f'Each line is one object: {{"{column}": "…"}}.',
            )
        yield checked(value or "", where)


def read_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a table with a header (.csv, .tsv) or of JSON objects (.jsonl), one after the other.

    Raises:
        DataError: the file cannot be read, is malformed or not UTF-8.
    """
    return (row for _, row in _rows(file, None))


def of_row(row: Mapping[str, Any], columns: Sequence[str], number: int) -> list[str]:
    """The texts in some columns of a row, none of them empty; `number` is what errors call it by.

    Raises:
        DataError: it lacks one of them.
    """
    texts = []
    for column in columns:
        if not isinstance(row.get(column), str):
            there = ", ".join(f"'{name}'" for name in row)
            raise DataError(
                f"row {number} has no text in a column '{column}'; it has {there or 'none'}.{nearest(column, row)}",
                f"This model reads rows with the columns {' and '.join(columns)}.",
            )
        texts.append(checked(row[column], f"row {number}, column '{column}'"))
    return texts


def _rows(file: Path, column: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row behind where it is; a line of a .txt file is one with this column, which all others must have."""
    suffix = file.suffix.lower()
    if not file.is_file():
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(
            f"there is no file {file}.{nearest(file.name, beside)}", f"Relative names are looked for in {Path.cwd()}."
        )
    try:
        with file.open("rb") as stream:
            if suffix == ".txt" and column:
                yield from ((str(file), {column: text}) for text in text_lines(stream, str(file)))
            elif suffix == ".jsonl":
                yield from _json_lines(stream, str(file), column)
            else:
                yield from _table_lines(stream, str(file), column, "," if suffix == ".csv" else "\t")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "Check its permissions and its disk.") from error


def text_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """One text a line, as `read_texts` has them of a .txt file; `name` is what errors call the stream."""
    blank = 0
    for number, line in _lines(stream, name):
        if not line.strip():
            blank = blank or number  # at the end of a file it is no fault
            continue
        if blank:
            raise _empty(f"{name}, line {blank}")
        yield checked(line.rstrip("\r\n"), f"{name}, line {number}")


def _json_lines(stream: BinaryIO, name: str, column: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(stream, name):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        example = f'Each line is one object: {{"{column or "name"}": "…"}}.'
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})", example) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object", example)
        if column is not None and column not in row:
            raise _no_column(where, column, list(row))
        yield where, row


def _table_lines(
    stream: BinaryIO, name: str, column: str | None, delimiter: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = table_fields((line for _, line in _lines(stream, name)), name, delimiter)
    _, header = next(rows, ("", None))
    if header is None:
        return
    if column is not None and column not in header:
        raise _no_column(name, column, header)
    for where, fields in rows:
        yield where, dict(zip(header, fields, strict=True))


def table_fields(lines: Iterable[str], name: str, delimiter: str) -> Generator[tuple[str, list[str]], None, None]:
    """The fields of each row of a CSV file that has some, behind where it is: first the header, then as many for each.

    Raises:
        DataError: a row has more or fewer fields, or its quotes do not pair up.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    limit, begin = csv.field_size_limit(sys.maxsize), 1
    try:
        header = next(reader, None)
        if header is None:
            return
        yield f"{name}, line {begin}", header
        begin = reader.line_num + 1
        for fields in reader:
            where = f"{name}, line {begin}"
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{where}: {len(fields)} fields, where the header names {len(header)}",
                    "Put quotes around a field that holds the delimiter or a line break.",
                )
            if fields:
                yield where, fields
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {begin}: a quote that is not closed or not doubled ({error})",
            'A field that holds quotes stands in quotes itself, with each inner one doubled: "say ""so""".',
        ) from error
    finally:
        csv.field_size_limit(limit)


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """The lines with their numbers and line ends, without the mark that some editors put before the first."""
    for number, line in enumerate(stream, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            encoding = "UTF-16" if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")) else "ISO-8859-1"
            raise DataError(
                f"{name}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8",
                f"Convert it, if {encoding} is what it is in: iconv -f {encoding} -t UTF-8",
            ) from error


def checked(text: str, where: str) -> str:
    """The text itself.

    Raises:
        DataError: it is empty, or cannot be written as UTF-8.
    """
    if not text.strip():
        raise _empty(where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a character (a lone surrogate)", "Write the text in UTF-8.") from error
    return text


def _empty(where: str) -> DataError:
    return DataError(f"{where}: the text is empty", "Write something there, or leave it out.")


def _no_column(where: str, column: str, columns: Sequence[str]) -> DataError:
    there = ", ".join(f"'{name}'" for name in columns[:20]) + (" …" if len(columns) > 20 else "")
    return DataError(
        f"{where} has no column '{column}'; it has {there or 'none'}.{nearest(column, columns)}",
        "Name the column that holds the texts with --text. The first line of a CSV or TSV file must name its columns.",
    )
