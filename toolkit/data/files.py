"""Reading files of labelled texts: `datasets` reads them, this module says what is wrong with those it cannot.

Two faults it would not notice are looked for beforehand: a CSV line with too few fields (filled up in silence)
and one more field in every line than in the header (the first column then becomes an index, and all others shift).
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from toolkit.data.mapping import quiet
from toolkit.errors import DataError, ToolkitError, nearest
from toolkit.text_files import table_fields

Kind = Literal["csv", "tsv", "jsonl", "json", "parquet", "text", "parallel"]
"""`parallel`: two text files, of which a line of the second belongs to each line of the first."""

_KINDS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
PLAIN_TEXTS = (".txt", ".conll", ".iob", ".bio")
"""Files of lines, the last three of tokens with their tags."""
_BYTES_FOR_A_BAR = 100_000_000
TextsIn = Literal["file", "paragraph", "line"]


Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
ROLE_OF_WORD: dict[str, Role] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""How splits are called, in names of files and on the hub."""


@dataclass(frozen=True)
class Part:
    """The files of one split, all of one kind.

    Attributes:
        kind: how they are read.
        files: in the order of their names.
        classes: for text files only, the class of each; empty where they have none.
        texts_in: for text files only, what one text is: a whole file, a paragraph between blank lines, or a line.
    """

    kind: Kind
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    texts_in: TextsIn = "file"


@dataclass(frozen=True)
class Labelled:
    """Texts and labels as they were found.

    Attributes:
        texts: one column, `text`: string or null.
        labels: strings or nulls, as many.
        begins: for messages, (first row, name) of each file among these rows.
        groups: strings or nulls, as many; None where they were not asked for.
    """

    texts: Dataset
    labels: pa.ChunkedArray
    begins: tuple[tuple[int, str], ...]
    groups: pa.ChunkedArray | None = None


def kind_of(path: Path, *, plain: bool = False) -> Kind | None:
    """The kind of a data file by its name, without regard to `.gz`; None for one that is no data file.

    Args:
        path: of the file.
        plain: texts need no label, so that `.txt` and its kin are data files.
    """
    suffix, zipped = path.suffix.lower(), False
    if suffix == ".gz":
        suffix, zipped = Path(path.stem).suffix.lower(), True
    kind = _KINDS.get(suffix)
    if plain and suffix in PLAIN_TEXTS:
        return "text"
    return None if zipped and kind == "parquet" else kind


def read_part(part: Part, text: str, label: str | None, scratch: Path, group: str | None = None) -> Iterator[Labelled]:
    """The files of a split, one after the other (text files all at once).

    Args:
        part: which files.
        text: column of the texts.
        label: column of the labels; None where the texts have none.
        scratch: folder for the Arrow files behind the result.
        group: column of what keeps rows together.

    Raises:
        DataError: a file is empty, malformed, not UTF-8 or lacks a column.
    """
    if part.kind == "text":
        if group is not None:
            raise DataError(f"text files have no column '{group}'", "Leave --data.group out, or give a table.")
        yield _read_text_files(part, scratch)
        return
    columns = _named(text, label, group)
    names = list(columns.values())
    for file in part.files:
        if file.stat().st_size == 0:
            raise _empty(file)
        with quiet(bars=file.stat().st_size >= _BYTES_FOR_A_BAR):
            table = _read_table(part.kind, file, columns, scratch)
            check_columns(table.column_names, columns, str(file))
            try:
                # The readers of JSON and Parquet take any bytes for text, and it would come out much later.
                table.select_columns(names).data.validate(full=True)
            except pa.ArrowInvalid as error:
                raise _diagnosis(file, part.kind, error) from error
            found = labelled(table, text, label, str(file), group)
        yield found


def labelled(table: Dataset, text: str, label: str | None, where: str, group: str | None = None) -> Labelled:
    """Take the columns out of a table and bring them to strings.

    A `ClassLabel` gives its names; its −1 is a missing label.

    Raises:
        DataError: a column is missing or holds neither words nor numbers.
    """
    columns = _named(text, label, group)
    check_columns(table.column_names, columns, where)
    for name in columns.values():
        _check_scalar(table, name, where)
    texts = table.select_columns([text])
    if text != "text":
        texts = texts.rename_column(text, "text")
    if texts.features["text"] != Value("string"):
        texts = texts.cast_column("text", Value("string"))
    words = {
        key: _as_words(table.select_columns([name]).with_format("arrow")[:].column(name), table.features[name])
        for key, name in columns.items()
        if key != "text"
    }
    return Labelled(texts, words.get("label", _no_labels(len(texts))), ((0, where),), words.get("group"))


def _named(text: str, label: str | None, group: str | None) -> dict[str, str]:
    """The columns that are asked for, by the key that names each."""
    return {key: name for key, name in (("text", text), ("label", label), ("group", group)) if name is not None}


def _no_labels(rows: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(rows, pa.string())])


def check_columns(columns: Sequence[str], asked: Mapping[str, str], where: str) -> None:
    """Raises DataError where one that is asked for, under the key that names it, is not among `columns`."""
    for key, wanted in asked.items():
        if wanted not in columns:
            there = ", ".join(f"'{column}'" for column in columns[:20]) + (" …" if len(columns) > 20 else "")
            raise DataError(
                f"{where} has no column '{wanted}'; it has {there}.{nearest(wanted, columns)}",
                f"Name the column that holds the {key} with --data.{key}. "
                "The first line of a CSV or TSV file must name its columns.",
            )


def _check_scalar(table: Dataset, column: str, where: str) -> None:
    feature = table.features[column]
    if not isinstance(feature, ClassLabel | Value):
        mixed = type(feature).__name__ == "Json"
        holds = "words in some rows and numbers or objects in others" if mixed else "lists or objects"
        raise DataError(
            f"column '{column}' of {where} holds {holds}",
            "It must hold one word or number a row: write all of them in quotes, or name another column with "
            "--data.text or --data.label. Lists of labels are learnt with --data.target labels.",
        )


def _as_words(column: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    if isinstance(feature, ClassLabel) and pa.types.is_integer(column.type):
        known = pc.if_else(pc.greater_equal(column, 0), column, None)
        return pc.take(pa.array(feature.names, pa.string()), known)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return pc.cast(column, pa.string())


def _read_table(kind: Kind, file: Path, columns: Mapping[str, str], scratch: Path) -> Dataset:
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        rows = check_lines(file, delimiter, lambda header: check_columns(header, columns, str(file)))
        table = _load(
            file,
            "csv",
            scratch,
            sep=delimiter,
            encoding="utf-8",
            # Strings in all of them: else "007" is read as 7, and a class called "None" or "NA" as missing.
            features=Features({column: Value("string") for column in columns.values()}),
            keep_default_na=False,
            na_values=[""],
        )
        if len(table) != rows:
            raise DataError(
                f"{file} has {rows} rows by one reading and {len(table)} by another: its quotes do not pair up",
                "Write it again with a CSV library, or as JSONL.",
            )
        return table
    if kind == "parquet":
        _check_parquet(file, columns)
        return _load(file, "parquet", scratch, columns=list(columns.values()))
    return _load(file, "json", scratch)


def _load(file: Path, builder: str, scratch: Path, **options: Any) -> Dataset:
    try:
        return load_dataset(
            builder, data_files={"train": [glob.escape(str(file))]}, split="train", cache_dir=str(scratch), **options
        )
    except Exception as error:  # whatever the reader raises, the user is to hear which file and which line
        raise _diagnosis(file, builder, error) from error


def _empty(file: Path) -> DataError:
    return DataError(f"{file} has no rows", "Remove the file or fill it.")


def check_lines(file: Path, delimiter: str, check_header: Callable[[list[str]], None]) -> int:
    """The number of rows of a CSV file, each with as many fields as the header, which `check_header` is given.

    Raises:
        DataError: it is empty, ragged or not UTF-8, or its quotes do not pair up.
    """
    try:
        with open_file(file) as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            with closing(table_fields(stream, str(file), delimiter)) as fields:
                _, header = next(fields, ("", []))
                check_header(header)
                rows = sum(1 for _ in fields)
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise _diagnosis(file, "csv", error) from error
    if not rows:
        raise _empty(file)
    return rows


def _check_parquet(file: Path, columns: Mapping[str, str]) -> None:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file: {_first_line(error)}", "Write it again.") from error
    with parquet:
        check_columns(parquet.schema_arrow.names, columns, str(file))
        if not parquet.metadata.num_rows:
            raise _empty(file)


def _read_text_files(part: Part, scratch: Path) -> Labelled:
    features = Features({"text": Value("string"), "file": Value("int32")})
    paths = [str(file) for file in part.files]
    try:
        with quiet(bars=len(paths) >= 20_000):
            rows = Dataset.from_generator(
                _texts, features=features, cache_dir=str(scratch), gen_kwargs={"paths": paths, "what": part.texts_in}
            )
    except Exception as error:  # `datasets` wraps what the generator raises
        cause = error if isinstance(error, ToolkitError) else error.__cause__
        where = str(part.files[0].parent.parent)
        raise cause if isinstance(cause, ToolkitError) else DataError(f"{where}: {_first_line(error)}") from error
    labels = pa.chunked_array([pa.array(part.classes, pa.string())]) if part.classes else _no_labels(len(rows))
    files, first = np.unique(rows.with_format("numpy")["file"][:], return_index=True)
    begins = tuple((int(row), paths[file]) for file, row in zip(files, first, strict=True))
    return Labelled(rows.remove_columns("file"), labels, begins)


def _texts(paths: list[str], what: TextsIn) -> Iterator[dict[str, Any]]:
    for number, path in enumerate(paths):
        try:
            with open_file(Path(path)) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
                for text in [lines.read()] if what == "file" else _cut(lines, what):
                    yield {"text": text, "file": number}
        except (UnicodeDecodeError, EOFError, OSError) as error:
            raise _diagnosis(Path(path), "text", error) from error


def _cut(lines: Iterable[str], what: TextsIn) -> Iterator[str]:
    """Paragraphs or lines, none of them blank."""
    for filled, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if filled and what == "paragraph":
            yield "".join(group)
        elif filled:
            yield from group


def open_file(file: Path) -> BinaryIO:
    """For reading bytes, through gzip where its name says so."""
    return cast(BinaryIO, gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


def _diagnosis(file: Path, kind: str, error: Exception) -> DataError:
    """Why a file cannot be read, with the line at fault where there is one."""
    try:
        with open_file(file) as stream:
            fault = None if kind == "parquet" else _line_that_is_not_utf8(file, stream)
        if fault is None and kind in ("json", "jsonl"):
            with open_file(file) as stream:
                fault = _line_that_is_not_json(file, stream)
    except (EOFError, OSError) as broken:
        if file.suffix.lower() == ".gz":
            return DataError(f"{file} is no whole gzip file: {_first_line(broken)}", "Copy or compress it again.")
        return DataError(f"{file} cannot be read: {_first_line(broken)}", "Check its permissions and its disk.")
    return fault or DataError(
        f"{file} cannot be read: {_first_line(error.__cause__ or error)}",
        "Check that its content is of the kind that its name says.",
    )


def _line_that_is_not_utf8(file: Path, lines: Iterable[bytes]) -> DataError | None:
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            wide = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
            encoding = "UTF-16" if wide else "ISO-8859-1"
            unzip, plain = ("gunzip -c", file.with_suffix("")) if file.suffix.lower() == ".gz" else ("cat", file)
            return DataError(
                f"{file}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8",
                f"Convert it, if {encoding} is what it is in: {unzip} '{file}' | iconv -f {encoding} -t UTF-8 "
                f"> '{plain.with_name('utf8-' + plain.name)}'",
            )
    return None


def _line_that_is_not_json(file: Path, stream: BinaryIO) -> DataError | None:
    """The first malformed line of JSON lines, or the fault of one JSON document."""
    start = stream.read(4096).decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    stream.seek(0)
    if not start:
        return _empty(file)
    return _fault_of_document(file, stream) if start.startswith("[") else _fault_of_lines(file, stream)


def _fault_of_document(file: Path, stream: BinaryIO) -> DataError | None:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return DataError(f"{file}, line {error.lineno}: not JSON ({error.msg})", "Mend it or write the file again.")
    return None if rows else _empty(file)


def _fault_of_lines(file: Path, lines: Iterable[bytes]) -> DataError | None:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            return DataError(
                f"{file}, line {number}: not JSON ({error.msg}): {line[:60].decode('utf-8', errors='replace').strip()}",
                'Each line is one object: {"text": "…", "label": "…"}. Mend this one or remove it.',
            )
        if not isinstance(row, dict):
            return DataError(
                f"{file}, line {number}: a {type(row).__name__}, not an object",
                'Each line is one object: {"text": "…", "label": "…"}.',
            )
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
