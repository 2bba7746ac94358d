"""`toolkit data prepare`: rows of any kind collected, cleaned and split into files, with a page of what was done.

Recipes do the same to their data by themselves. This leaves the result as plain files: to look at, to hand on, or to
train several recipes on the same splits.
"""

from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from toolkit.config import ChatConfig, CorpusConfig, PairsConfig, SourcesConfig, TextDataConfig, parse
from toolkit.data import answer_pairs, conversations, text_corpus
from toolkit.data.files import ROLES
from toolkit.data.mapping import quiet
from toolkit.data.rows import gather_rows, write
from toolkit.data.sources import resolve
from toolkit.data.text_classification import cleaned_and_split
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram
from toolkit.folders import refuse_taken, written_aside
from toolkit.normalise import check_normalisation
from toolkit.report import Console
from toolkit.report.data_page import write_data_page

Rows = dict[str, Dataset]


@dataclass(frozen=True)
class _Texts:
    """Plain texts."""

    data: CorpusConfig = CorpusConfig()


@dataclass(frozen=True)
class _Labelled:
    """Texts with a class each."""

    data: TextDataConfig = TextDataConfig()


@dataclass(frozen=True)
class _Chats:
    """Conversations."""

    data: ChatConfig = ChatConfig()


@dataclass(frozen=True)
class _Pairs:
    """A preferred and another answer."""

    data: PairsConfig = PairsConfig()


@dataclass(frozen=True)
class _Rows:
    """Rows with any columns, which stay as they are."""

    data: SourcesConfig = SourcesConfig()


@dataclass(frozen=True)
class _Kind:
    """What rows are, and how they are read: settings to splits and facts."""

    config: type[Any]
    read: Callable[[Any], tuple[Rows, dict[str, Any]]]


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help=f"what the rows are: {', '.join(KINDS)}")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="to write to; must be new or empty")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the files (default: jsonl)")
    parser.epilog = (
        "All other options are those of the data section, as --data.name FILE --data.normalise html control; "
        "--config FILE reads them from YAML, --help-data lists them."
    )
    parser.add_argument("--help-data", action="store_true", help="list the options of the data section")


def run(arguments: Namespace) -> int:
    """`toolkit data prepare`: settings first, then data, and the folder last of all.

    Raises:
        ToolkitError: a mistake of the user.
    """
    kind, target = KINDS[arguments.kind], arguments.output.expanduser()
    words = [*arguments.rest, "--help"] if arguments.help_data else arguments.rest
    config = parse(kind.config, words, description=kind.config.__doc__ or "")
    refuse_taken(target)
    splits, facts = kind.read(config.data)
    facts |= {"counts": {name: len(rows) for name, rows in splits.items()}, "lengths": _lengths(splits)}
    with written_aside(target) as aside:
        for name, rows in splits.items():
            _write(rows, aside / f"{name}.{arguments.format}")
        (aside / "facts.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        write_data_page(facts, aside / "report.html", f"{target.name} · prepared data")
    _tell(Console(), facts, target, arguments)
    return 0


def _write(rows: Dataset, file: Path) -> None:
    with quiet(bars=len(rows) >= 100_000):
        if file.suffix == ".parquet":
            rows.to_parquet(file)
        else:
            rows.to_json(file, lines=True, force_ascii=False)


def _tell(console: Console, facts: Mapping[str, Any], target: Path, arguments: Namespace) -> None:
    rows = [
        (stage["stage"], f"{stage['in']:,}", f"{stage['out']:,}", f"{stage['in'] - stage['out']:,}")
        for stage in facts["stages"]
    ]
    console.table("cleaning", ("stage", "rows in", "out", "dropped"), rows)
    for stage in facts["stages"]:
        for example in stage["examples"][:1]:
            console.note(f"  {stage['stage']}: {example}")
    console.label_balance(facts.get("labels", {}))
    for warning in facts["warnings"]:
        console.warn(warning)
    console.note(", ".join(f"{count:,} {name}" for name, count in facts["counts"].items()) + f": {target}")
    console.note(f"page: {target / 'report.html'}")
    names = {name: target / f"{name}.{arguments.format}" for name in facts["counts"]}
    options = f"--data.name {names['train']} --data.validation {names['validation']} --data.test {names['test']}"
    print(f"in a recipe: {options}")  # never wrapped, so that it can be copied


def _of_corpus(corpus: TextCorpus, row: Callable[[str], dict[str, Any]]) -> tuple[Rows, dict[str, Any]]:
    with quiet(bars=False):
        splits = {str(name): Dataset.from_list(list(map(row, corpus.splits[name]["text"]))) for name in ROLES}
    return splits, dict(corpus.facts)


def _read_texts(config: CorpusConfig) -> tuple[Rows, dict[str, Any]]:
    return _of_corpus(text_corpus(config), lambda text: {"text": text})


def _read_chats(config: ChatConfig) -> tuple[Rows, dict[str, Any]]:
    return _of_corpus(conversations(config), lambda text: {"messages": json.loads(text)})


def _read_pairs(config: PairsConfig) -> tuple[Rows, dict[str, Any]]:
    def row(text: str) -> dict[str, Any]:
        pair = json.loads(text)
        return {key: [*pair["question"], pair[key]] for key in ("chosen", "rejected")}

    return _of_corpus(answer_pairs(config), row)


def _read_rows(config: SourcesConfig) -> tuple[Rows, dict[str, Any]]:
    corpus = gather_rows(config, write, ("rows", "write one object a line"), {"kind": "rows"}, _words_of_row)
    return _of_corpus(corpus, json.loads)


def _words_of_row(text: str) -> str:
    return " ".join(_strings(json.loads(text)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif value is not None:
        yield str(value)


def _read_labelled(config: TextDataConfig) -> tuple[Rows, dict[str, Any]]:
    check_normalisation(config.normalise)
    source = resolve(config)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, cleaned, chosen, stages = cleaned_and_split(config, source, Path(scratch))
        splits: Rows = {}
        labels: dict[str, dict[str, int]] = {}
        for role, name in enumerate(ROLES):
            rows = np.flatnonzero(chosen.roles == role)
            names = [cleaned.labels[code] for code in cleaned.codes[rows]]
            counts = np.bincount(cleaned.codes[rows], minlength=len(cleaned.labels))
            labels[name] = dict(zip(cleaned.labels, counts.tolist(), strict=True))
            # Taken into memory: the files behind it go with the scratch folder.
            splits[name] = Dataset.from_dict({"text": corpus.texts.select(rows)["text"][:], "label": names})
    warnings = [*source.warnings, *cleaned.warnings, *chosen.warnings]
    return splits, {"sources": [config.name], "stages": stages, "labels": labels, "warnings": warnings}


def _lengths(splits: Rows) -> dict[str, dict[str, list[int]]]:
    """Characters of the rows of each split: edges and counts of a histogram."""
    found = {}
    for name, rows in splits.items():
        sizes = np.array([sum(map(len, _strings(row))) for row in rows])
        found[name] = {"edges": [*EDGES, max(2 * EDGES[-1], int(sizes.max()))], "counts": length_histogram(sizes)}
    return found


KINDS = {
    "texts": _Kind(_Texts, _read_texts),
    "labelled": _Kind(_Labelled, _read_labelled),
    "chats": _Kind(_Chats, _read_chats),
    "pairs": _Kind(_Pairs, _read_pairs),
    "rows": _Kind(_Rows, _read_rows),
}
"""What can be prepared."""
