"""The command `toolkit predict`: its options, what it refuses, and the order of its work."""

from __future__ import annotations

import csv
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from toolkit import predict
from toolkit.arguments import number, whole
from toolkit.errors import ConfigError, DataError
from toolkit.normalise import normalise_row
from toolkit.predict.kinds import CLASSIFIER, Kind, check_options, load_answerer
from toolkit.predict.output import open_sink, progress_bar, shown
from toolkit.predict.saved import SavedModel, find_model
from toolkit.report import Console
from toolkit.requirements import check_versions
from toolkit.text_files import FILE_TYPES, checked, read_rows, read_texts, text_lines

_OF_SOME_KINDS = ("top", "max_length", "tokens", "temperature", "plain")


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a model that a run has saved")
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        default=(),  # without it, argparse calls them required where RUN is missing
        help="a text (behind -- if it begins with -); or - to read them from standard input, one a line",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="texts to classify, translate or go on with: " + ", ".join(FILE_TYPES) + " (.txt: one a line)",
    )
    parser.add_argument("--text", metavar="COLUMN", help="column of the texts in --file (default: text)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with all probabilities")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to a .csv or .jsonl file")
    add_model_arguments(parser)


def add_model_arguments(parser: ArgumentParser) -> None:
    """The options of how a model answers."""
    parser.add_argument(
        "--top", type=whole(1), metavar="K", help="give the K most likely labels (default: 1; JSON: all)"
    )
    parser.add_argument(
        "--tokens",
        type=whole(1),
        metavar="N",
        help="write N tokens at most (a language model: 100; else as in the run)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, math.nextafter(100, 0)),
        metavar="T",
        help="of what a language model draws; 0: the likeliest (default: 0.7)",
    )
    parser.add_argument(
        "--plain", action="store_true", help="let a chat model go on with the text, instead of answering it"
    )
    parser.add_argument(
        "--batch", type=whole(1), metavar="N", default=32, help="texts of one forward pass (default: 32)"
    )
    parser.add_argument(
        "--max-length",
        type=whole(1),
        metavar="N",
        help="cut texts to N tokens (default: as the run did, data.max_length)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def run(arguments: Namespace) -> int:
    """`toolkit predict`: from the cheapest check to the dearest, and only then the model.

    Raises:
        ToolkitError: a mistake of the user.
    """
    _check_options(arguments)
    saved = find_model(Path(arguments.run))
    check_versions()
    options = given_options(arguments)
    check_options(saved.kind, options)
    inputs, total = _inputs_of(arguments, saved.kind)
    if saved.normalise:
        inputs = (normalise_row(one, saved.normalise) for one in inputs)
    silence_libraries()
    if saved.kind is not CLASSIFIER:
        return _answer(arguments, saved, inputs, options)
    # Through the package, which imports torch at this name and not before.
    classifier = predict.Classifier(saved, device=arguments.device, max_length=arguments.max_length)
    classifier.check_top(arguments.top)
    notes = Console(out=sys.stderr)
    if saved.status not in ("", "finished"):
        notes.warn(f"the run ended early ({saved.status}): this is the model as it was then")
    if saved.max_length is None and arguments.max_length is None:
        notes.note(f"texts are cut to {classifier.max_length} tokens, the most this model takes (see --max-length)")
    results = open_sink(arguments.output, classifier.labels, top=arguments.top, as_json=arguments.json, total=total)
    done = 0
    try:
        with results as sink, progress_bar(total) as bar:
            advance = partial(bar.advance, bar.task_ids[0])
            for window in classifier.stream(inputs, batch=arguments.batch, on_batch=advance):
                done += len(window)
                bar.stop()
                sink.write(window)
                bar.start()
    except KeyboardInterrupt:
        print(f"{done:,} texts were classified", file=sys.stderr)
        raise
    if not done:
        raise DataError("standard input has no text", "Write one text a line to it.")
    if arguments.output:
        notes.note(f"{done:,} texts classified: {arguments.output}")
    return 0


def _answer(arguments: Namespace, saved: SavedModel, inputs: Iterable[Any], options: Mapping[str, Any]) -> int:
    """Let a model of any other kind answer, a line or a row for each input."""
    answerer = load_answerer(saved.kind, saved, device=arguments.device, **options)
    output: Path | None = arguments.output
    done = 0
    try:
        with output.open("w", encoding="utf-8", newline="") if output else nullcontext(sys.stdout) as out:
            table = csv.writer(out, lineterminator="\n")
            as_table = output is not None and output.suffix.lower() == ".csv"
            for window in answerer.stream(inputs, batch=arguments.batch):
                for answer in window:
                    if as_table and not done:
                        table.writerow(answer.fields)
                    if as_table:
                        table.writerow(map(_cell, answer.fields.values()))
                    elif output or arguments.json:
                        print(json.dumps(answer.fields, ensure_ascii=False), file=out)
                    else:
                        print(shown(answer.shown), end="\n\n", file=out)
                    done += 1
                out.flush()
    except OSError as error:
        if output is None or isinstance(error, BrokenPipeError):
            raise
        raise DataError(
            f"--output {output} cannot be written: {error.strerror}", "Check its folder and the free space."
        ) from error
    except KeyboardInterrupt:
        print(f"{done:,} were answered", file=sys.stderr)
        raise
    return 0


def _cell(value: Any) -> Any:
    """What is no word or number, as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def given_options(arguments: Namespace) -> dict[str, Any]:
    """Those of `add_model_arguments` that only some kinds read, as far as they were given."""
    found = {name: getattr(arguments, name) for name in _OF_SOME_KINDS}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _check_options(arguments: Namespace) -> None:
    """Refuse what contradicts itself or cannot take effect."""
    file, output = arguments.file, arguments.output
    if arguments.texts and file:
        raise ConfigError("texts are given both on the command line and in --file", "Give one of the two.")
    if not arguments.texts and not file:
        raise ConfigError("there is no text", 'Write it behind the run in quotes: "some text"; or give --file, or -.')
    if "-" in arguments.texts and len(arguments.texts) > 1:
        raise ConfigError("'-' (standard input) stands beside other texts", "Give one of the two.")
    if file and file.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"--file {file} is of no type that can be read", f"Give {', '.join(FILE_TYPES)}.")
    if arguments.text is not None and (not file or file.suffix.lower() == ".txt"):
        raise ConfigError(f"--text {arguments.text} has no effect without a .csv, .tsv or .jsonl --file", "Drop it.")
    if output and output.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--output {output} is of no type that can be written", "Name a .csv or a .jsonl file.")
    if output and arguments.json:
        raise ConfigError("--json prints and --output writes to a file", "Give one of the two.")
    if output and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}", "Make it first.")
    if output and file and output.exists() and file.exists() and output.samefile(file):
        raise ConfigError(f"--output {output} would write over the texts", "Name another file.")


def _inputs_of(arguments: Namespace, kind: Kind) -> tuple[Iterable[Any], int | None]:
    """What the model is to answer to, and how much there is where that is known.

    A file is read twice: a fault in its last line is told before the model is loaded.
    """
    if kind.reads == "texts":
        return _texts_of(arguments)
    if arguments.text is not None:
        raise ConfigError(f"--text has no effect on {kind.about}", "Drop it.")
    if kind.reads == "files":
        files = _files_of(arguments.texts or read_texts(arguments.file), kind)
        return files, len(files)
    if arguments.file:
        if arguments.file.suffix.lower() == ".txt":
            raise ConfigError(f"--file {arguments.file} has no columns", "Give a .csv, .tsv or .jsonl file.")
        return read_rows(arguments.file), sum(1 for _ in read_rows(arguments.file))
    rows = [_row(text) for text in arguments.texts]
    return rows, len(rows)


def _files_of(names: Iterable[str], kind: Kind) -> list[Path]:
    """The files that are named, and in the place of a folder those in it that the model can answer to."""
    files: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in kind.suffixes)
            if not inside:
                raise DataError(f"the folder {path} has no file that {kind.about} reads", "Name the files.")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no file {path}", f"Relative names are looked for in {Path.cwd()}.")
    return files


def _row(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(row := json.loads(text), dict):
            return row
    raise DataError(f"{text[:60]!r} is no JSON object", 'This model reads rows: \'{"column": "value", …}\', or --file.')


def _texts_of(arguments: Namespace) -> tuple[Iterable[str], int | None]:
    """The texts, and how many there are where that is known.

    A file is read twice: a fault in its last line is told before the model is loaded.
    """
    if arguments.file:
        column = arguments.text or "text"
        total = sum(1 for _ in read_texts(arguments.file, column))
        if not total:
            raise DataError(f"{arguments.file} has no text", "Fill it.")
        return read_texts(arguments.file, column), total
    if arguments.texts == ["-"]:
        return text_lines(sys.stdin.buffer, "standard input"), None
    texts = [checked(text, f"text {number}") for number, text in enumerate(arguments.texts, start=1)]
    return texts, len(texts)


def silence_libraries() -> None:
    """Their warnings and bars are of no use to who asks a model."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
