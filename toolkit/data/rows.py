"""Rows of any kind, from wherever they lie, as canonical texts: JSON that says all that is learnt from a row.

So all that is done to texts (repeats, leaks, near-duplicates, filters, splits by hash) is done to any rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value

from toolkit.config import Normalisation, SourcesConfig
from toolkit.data.files import Part, Role, open_file
from toolkit.data.hub import hub_splits
from toolkit.data.mapping import quiet
from toolkit.data.text_corpus import Place, Rows, TextCorpus, find_places, gather_places
from toolkit.errors import DataError, ToolkitError
from toolkit.normalise import normalise_row

_BYTES_FOR_A_BAR = 100_000_000
_FEATURES = Features({name: Value("string") for name in ("text", "group", "fault", "where")})
Canonical = Callable[[Mapping[str, Any]], str]
What = tuple[str, str]
"""What rows are to be, in the plural, and how to let them be that."""


class Unfit(Exception):
    """Why a row is none to learn from, as the end of a sentence."""


OfLines = Callable[[Iterable[str]], Iterator[Mapping[str, Any] | Unfit]]
"""Makes rows of the lines of a file; picklable."""


def gather_rows(
    config: SourcesConfig,
    canonical: Canonical,
    what: What,
    settings: Mapping[str, Any],
    words: Callable[[str], str],
    *,
    of_lines: OfLines | None = None,
    places: Mapping[Role, Sequence[Place]] | None = None,
) -> TextCorpus:
    """Read rows, make texts of them, drop repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks.

    Args:
        config: where they are, and how they are split.
        canonical: the text of a row, or `Unfit`.
        what: the rows are to be.
        settings: what `canonical` goes by, fit for JSON.
        words: what a text says, by which it is filtered and compared; picklable.
        of_lines: makes rows of the lines of a .txt file or its kin; by default these are none of this kind.
        places: where the rows of each split are, if that is known; by default the names in `config` say so.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are unfit.
    """
    normal = partial(_normal, canonical=canonical, steps=config.normalise) if config.normalise else canonical
    read = partial(_read, canonical=normal, what=what, config=config, of_lines=of_lines)
    if places is None:
        places = find_places(config, "file" if of_lines else None)
    corpus = gather_places(config, read, places, settings, words=words)
    refuse_unfit(corpus, what, config.max_bad_rows)
    return corpus


def refuse_unfit(corpus: TextCorpus, what: What, most: int) -> None:
    """Raises DataError where more rows are unfit than `most`: of all sources, or by the bound of an earlier run."""
    if corpus.facts["dropped"]["malformed"] > most:
        raise DataError(
            f"rows are no {what[0]} to learn from: {' '.join(corpus.facts['warnings'])}",
            f"Mend them, {what[1]}, or raise --data.max_bad_rows.",
        )


def write(value: Any) -> str:
    """As a canonical text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _normal(row: Mapping[str, Any], *, canonical: Canonical, steps: Sequence[Normalisation]) -> str:
    return canonical(normalise_row(dict(row), steps))


def _read(
    place: Place,
    role: Role,
    scratch: Path,
    canonical: Canonical,
    what: What,
    config: SourcesConfig,
    of_lines: OfLines | None,
) -> Iterator[Rows]:
    if isinstance(place, Part):
        if place.kind == "text" and of_lines is None:
            raise DataError(
                f"{place.files[0].parent.parent} holds plain texts, not {what[0]}",
                "Give JSONL, JSON, Parquet, CSV or TSV.",
            )
        if place.kind == "parallel":
            names = " and ".join(map(str, place.files))
            sources = [(names, partial(_line_pairs, *place.files), sum(file.stat().st_size for file in place.files))]
        else:
            sources = [
                (str(file), partial(rows_of_file, file, place.kind, of_lines), file.stat().st_size)
                for file in place.files
            ]
    else:
        splits = hub_splits(place)
        rows = splits.get(role, splits["train"])
        sources = [(place.name, partial(iter, rows), rows.nbytes)]
    for name, rows_of, size in sources:
        texts = partial(canonical_texts, name, rows_of, canonical, what, config)
        yield fit_texts(name, texts, scratch, bar=size >= _BYTES_FOR_A_BAR)


def fit_texts(name: str, generate: Any, scratch: Path, *, bar: bool) -> Rows:
    """The fit rows of a source, on the disk, and the faults of the others."""
    try:
        with quiet(bars=bar):
            folder = scratch / f"rows-{len(list(scratch.iterdir()))}"
            table = Dataset.from_generator(generate, features=_FEATURES, cache_dir=str(folder), fingerprint="rows")
    except Exception as error:  # `datasets` wraps what the generator raises
        cause = error if isinstance(error, ToolkitError) else error.__cause__ or error
        if isinstance(cause, ToolkitError):
            raise cause from error
        raise DataError(f"{name} cannot be read: {cause}", "Check that its content is what its name says.") from error
    columns = table.select_columns(["group", "fault", "where"]).with_format("arrow")[:]
    kept = pa.compute.is_null(columns.column("fault")).to_numpy().nonzero()[0]
    unfit = columns.filter(pa.compute.is_valid(columns.column("fault"))).to_pydict()
    faults = tuple(zip(unfit["where"], unfit["fault"], strict=True))
    return Rows(table.select(kept).select_columns(["text"]), columns.column("group").take(kept), faults)


def canonical_texts(
    name: str, rows_of: Any, canonical: Canonical, what: What, config: SourcesConfig
) -> Iterator[dict[str, Any]]:
    """The texts of the rows of a source and what keeps them together, or what is wrong with a row.

    Raises:
        DataError: that is so of more than `config.max_bad_rows`.
    """
    unfit: list[str] = []
    most = config.max_bad_rows
    for number, row in enumerate(rows_of(), start=1):
        where = f"row {number} of {name}"
        try:
            if isinstance(row, Unfit):
                raise row
            yield {"text": canonical(row), "group": group_of(row, config.group), "fault": None, "where": None}
        except Unfit as reason:
            unfit.append(f"{where}, because {reason}")
            if len(unfit) > most:
                raise DataError(
                    f"more than {most} rows of {name} are no {what[0]} to learn from, as {'; '.join(unfit[:5])}",
                    f"Mend them, {what[1]}, or raise --data.max_bad_rows.",
                ) from None
            yield {"text": None, "group": None, "fault": str(reason), "where": where}


def group_of(row: Mapping[str, Any], column: str | None) -> str | None:
    """What keeps a row together with others; None where it stands alone.

    Raises:
        Unfit: it has no such column, or one of lists or objects.
    """
    if column is None:
        return None
    if column not in row:
        raise Unfit(f"they have no column '{column}' (--data.group) but {', '.join(map(str, row))}")
    name = row[column]
    if isinstance(name, list | dict):
        raise Unfit(f"their column '{column}' (--data.group) holds no word or number")
    return None if name is None or name == "" else str(name)


def rows_of_file(file: Path, kind: str, of_lines: OfLines | None = None) -> Iterator[Mapping[str, Any] | Unfit]:
    """The rows of a file; in the place of one that cannot be read, why."""
    if kind == "parquet":
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
        return
    with open_file(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
        if kind in ("csv", "tsv"):
            yield from csv.DictReader(lines, delimiter="," if kind == "csv" else "\t")
        elif kind == "json":
            yield from map(_object, json.load(lines))
        elif kind == "text" and of_lines:
            yield from of_lines(lines)
        else:
            yield from (_json_line(line) for line in lines if line.strip())


def _line_pairs(sources: Path, targets: Path) -> Iterator[Mapping[str, Any] | Unfit]:
    """The lines of two files, side by side; in the place of those that cannot be read, why.

    Raises:
        DataError: they have not as many.
    """
    counts = []
    for file in (sources, targets):
        with open_file(file) as raw:
            counts.append(sum(1 for _ in raw))
    if counts[0] != counts[1]:
        raise DataError(
            f"{sources} has {counts[0]:,} lines and {targets} {counts[1]:,}",
            "A line of the second file belongs to each line of the first: align them again.",
        )
    with open_file(sources) as first, open_file(targets) as second:
        for lines in zip(first, second, strict=True):
            try:
                source, target = (line.decode("utf-8").strip("\ufeff\r\n") for line in lines)
            except UnicodeDecodeError:
                yield Unfit("they are not UTF-8")
            else:
                yield {"source": source, "target": target}


def _json_line(line: str) -> Mapping[str, Any] | Unfit:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError:
        return Unfit("they are not JSON")


def _object(row: Any) -> Mapping[str, Any] | Unfit:
    return row if isinstance(row, dict) else Unfit("they are no objects with columns")
