"""`toolkit predict`: put texts into classes with the model that a run has saved.

`find_model` checks a run's folder without reading a weight, `Classifier` loads the model and answers, `run` is the
command. A text's answer is that of the recipe's own evaluation: the same cut, the same padding mask, fp32.

torch and transformers are imported where the model is loaded and not above: they take seconds, and a misspelt path
or a missing column is told at once.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import yaml
from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from toolkit.errors import CheckpointError, ConfigError, DataError, ModelError, NumericsError, nearest
from toolkit.report import Console, RunFolder
from toolkit.report.console import PLAIN_WIDTH

BATCHES_OF_A_WINDOW = 16
"""Texts are sorted by length within a window and written window by window; the first ones are smaller."""
TEXTS_FOR_A_BAR = 200

_FILE_TYPES = (".txt", ".csv", ".tsv", ".jsonl")
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
)
_FALLBACK_LENGTH = 512
_LABEL_WIDTH = 30
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class SavedModel:
    """A model on the disk that looks whole.

    Attributes:
        folder: holds config.json, safetensors and the tokenizer.
        max_length: tokens to which the run cut its texts; None where no run says so.
        status: how the run ended, as its report says; empty where it says nothing.
    """

    folder: Path
    max_length: int | None
    status: str = ""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text.

    Attributes:
        text: as it was given.
        scores: probability of each label, the most likely first.
    """

    text: str
    scores: Mapping[str, float]

    @property
    def label(self) -> str:
        """The most likely label."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[self.label]

    def top(self, count: int | None) -> list[tuple[str, float]]:
        """The `count` most likely labels (all of them for None) with their probabilities."""
        return list(islice(self.scores.items(), count))


class Classifier:
    """A saved model, ready to answer in fp32.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens to which a text is cut; by default as in the run.

    Attributes:
        labels: names of the classes, by index.
        max_length: tokens to which a text is cut, special tokens included.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no classifier.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        import torch

        gpu = torch.cuda.is_available()
        if device == "cuda" and not gpu:
            raise ConfigError("--device cuda: there is no GPU that torch could use here", "Use --device cpu.")
        self._device = "cuda" if gpu and device != "cpu" else "cpu"
        self._tokenizer, model = _load(saved.folder)
        self._model = model.to(self._device).eval()
        self.labels: tuple[str, ...] = tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ModelError(f"{saved.folder}: its labels are {', '.join(self.labels)}; it takes two, and no two alike")
        longest = _longest(self._tokenizer, model.config)
        shortest = self._tokenizer.num_special_tokens_to_add(pair=False) + 1
        if max_length is not None and not shortest <= max_length <= longest:
            raise ConfigError(
                f"--max-length {max_length}: this model takes {shortest} to {longest} tokens", "Choose among these."
            )
        self.max_length: int = max_length or saved.max_length or longest

    def stream(
        self, texts: Iterable[str], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> Iterator[list[Prediction]]:
        """`predict` over any number of texts, of which only a window is in memory at a time.

        The sizes of the windows depend on nothing but `batch`: the same texts are always padded alike.
        """
        rest, batches = iter(texts), 1
        while window := list(islice(rest, batches * batch)):
            yield self.predict(window, batch=batch, on_batch=on_batch)
            batches = min(2 * batches, BATCHES_OF_A_WINDOW)

    def predict(
        self, texts: Sequence[str], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> list[Prediction]:
        """The predictions for `texts`, in their order.

        Args:
            texts: none of them empty.
            batch: texts of one forward pass; those of similar length go together.
            on_batch: called after each forward pass with the number of its texts.

        Raises:
            DataError: the tokenizer finds no token in a text.
            ConfigError: the batch does not fit into the device's memory.
            NumericsError: the model's answer is not finite.
        """
        rows = self._tokenize(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for index, row in zip(chosen, self._probabilities([rows[i] for i in chosen]), strict=True):
                ranked = sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1])
                found[index] = Prediction(texts[index], dict(ranked))
            on_batch(len(chosen))
        return [found[index] for index in range(len(texts))]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # The options of `toolkit.data.tokenize`, which training cuts its texts with: a test compares the two.
        options = {"add_special_tokens": True, "return_attention_mask": False, "return_token_type_ids": False}
        rows: list[list[int]] = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=False, verbose=False, **options
        )["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise DataError(f"the model's tokenizer finds no token in the text {text[:40]!r}", "Leave it out.")
        return rows

    def _probabilities(self, rows: Sequence[list[int]]) -> list[list[float]]:
        import torch

        # The mask, and no token type ids: what training gives the model.
        inputs = self._tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt")
        try:
            with torch.inference_mode():
                tensors = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
                probabilities = self._model(**tensors).logits.float().softmax(-1)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(rows)} texts of up to {len(rows[0])} tokens do not fit into the GPU's memory",
                "Use a smaller --batch.",
            ) from error
        if not torch.isfinite(probabilities).all():
            raise NumericsError(
                "the model's answer is not finite", "Its weights are damaged, or its training diverged: see its report."
            )
        result: list[list[float]] = probabilities.tolist()
        return result


def find_model(run: Path) -> SavedModel:
    """The model of a run, or a model folder itself, checked as far as it can be without loading it.

    Raises:
        CheckpointError: there is no such folder, it is no run, or the run has no model.
        ModelError: what is there is no classifier, or not whole.
    """
    run = run.expanduser()
    if not run.is_dir():
        beside = [entry.name for entry in run.parent.iterdir()] if run.parent.is_dir() else []
        what = "is a file, not a folder" if run.exists() else "is not there"
        raise CheckpointError(
            f"the run {run} {what}.{nearest(run.name, beside)}",
            f"Name the folder of a run, like runs/bert_cls/001. Relative names are looked for in {Path.cwd()}.",
        )
    if (run / "config.yaml").is_file():
        if not (run / "model" / "config.json").is_file():
            raise _no_model(run)
        _check_model(run / "model")
        return SavedModel(run / "model", _max_length(run), _status(run))
    if (run / "config.json").is_file():
        _check_model(run)
        parent = run.resolve().parent
        its_run = parent if run.resolve().name == "model" and (parent / "config.yaml").is_file() else None
        return SavedModel(run, _max_length(its_run) if its_run else None, _status(its_run) if its_run else "")
    runs = sorted(path.parent.name for path in run.glob("*/config.yaml"))
    raise CheckpointError(
        f"{run} is no run (it has no config.yaml) and no model (it has no config.json)",
        f"Name one of the runs in it: {', '.join(runs[-8:])}." if runs else "Name the folder of a run.",
    )


def _no_model(run: Path) -> CheckpointError:
    checkpoint = _settings(run).get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("save_model") is False:
        return CheckpointError(
            f"the run {run} kept no model: its config.yaml says checkpoint.save_model: false",
            "Train it again with --checkpoint.save_model True.",
        )
    ended = {"failed": "it failed", "interrupted": "it was interrupted"}.get(_status(run), "it has not finished")
    return CheckpointError(
        f"the run {run} has no model: {ended}",
        "A run writes its model/ when it ends: wait for it, or train again.",
    )


def _check_model(folder: Path) -> None:
    """Raises ModelError where the files in `folder` are no classifier that could be loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}/config.json cannot be read: {_first_line(error)}", "Copy the model again."
        ) from error
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        found = f"a {architectures[0]}" if architectures else "of no architecture that its config.json names"
        raise ModelError(
            f"the model in {folder} is {found}, not a text classifier",
            "Name a run of a recipe that trains one, like bert_cls.",
        )
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ModelError(
            f"the model in {folder} is made for {config['problem_type']}",
            "This command puts each text into one of several classes.",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no .safetensors file" + (f", only {pickled[0]}, which can run code" if pickled else ""),
            "Save the model with safetensors." if pickled else "Copy the model again, or train again.",
        )
    # Without any of them, transformers makes an empty tokenizer, in silence: every word is unknown to it.
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} has a model but no tokenizer (tokenizer.json)",
            "A run that was interrupted may leave it out: copy it there from the model that the run started from.",
        )


def _settings(run: Path) -> dict[str, Any]:
    text = RunFolder(run).read_config()
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"{run}/config.yaml is not valid YAML: {_first_line(error)}", "Take it from a backup."
        ) from error
    return settings if isinstance(settings, dict) else {}


def _max_length(run: Path) -> int | None:
    data = _settings(run).get("data")
    length = data.get("max_length") if isinstance(data, dict) else None
    if length is not None and (not isinstance(length, int) or length < 1):
        raise CheckpointError(
            f"{run}/config.yaml says data.max_length: {length}", "Write there to how many tokens the run cut its texts."
        )
    return length


def _status(run: Path) -> str:
    with suppress(CheckpointError):
        return str(RunFolder(run).read_report().get("status", ""))
    return ""


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model in `folder`: never from a hub, never with its own code, never a pickle."""
    import torch
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # each of the libraries below has its own; the user is to hear which folder it is
        raise ModelError(
            f"the model in {folder} cannot be loaded: {_first_line(error)}", "Copy it again, or train again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the model in {folder} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …)",
            "Copy it again, or train again.",
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no padding token", "Save one that has.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder finds the last token of a text
    return tokenizer, model


def _longest(tokenizer: Any, config: Any) -> int:
    """The most tokens that the model takes, as far as it says so."""
    positions = getattr(config, "max_position_embeddings", None) or _FALLBACK_LENGTH
    return int(min(positions, tokenizer.model_max_length or positions))


def read_texts(file: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file, one after the other.

    Args:
        file: one text a line (.txt), or a table with a header (.csv, .tsv), or JSON objects (.jsonl).
        column: where the texts are; not for .txt.

    Raises:
        DataError: the file cannot be read, is malformed or not UTF-8, lacks the column, or has an empty text.
    """
    suffix = file.suffix.lower()
    if not file.is_file():
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(
            f"there is no file {file}.{nearest(file.name, beside)}", f"Relative names are looked for in {Path.cwd()}."
        )
    try:
        with file.open("rb") as stream:
            if suffix == ".txt":
                yield from _text_lines(stream, str(file))
            elif suffix == ".jsonl":
                yield from _json_lines(stream, str(file), column)
            else:
                yield from _table_lines(stream, str(file), column, "," if suffix == ".csv" else "\t")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "Check its permissions and its disk.") from error


def _text_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    blank = 0
    for number, line in _lines(stream, name):
        if not line.strip():
            blank = blank or number  # at the end of a file it is no fault
            continue
        if blank:
            raise _empty(f"{name}, line {blank}")
        yield _checked(line.rstrip("\r\n"), f"{name}, line {number}")


def _json_lines(stream: BinaryIO, name: str, column: str) -> Iterator[str]:
    for number, line in _lines(stream, name):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        example = f'Each line is one object: {{"{column}": "…"}}.'
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({_first_line(error)})", example) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object", example)
        if column not in row:
            raise _no_column(where, column, list(row))
        if not isinstance(row[column], str | None):
            raise DataError(f"{where}: '{column}' is {json.dumps(row[column])[:40]}, not a text", example)
        yield _checked(row[column] or "", where)


def _table_lines(stream: BinaryIO, name: str, column: str, delimiter: str) -> Iterator[str]:
    reader = csv.reader((line for _, line in _lines(stream, name)), delimiter=delimiter, strict=True)
    limit, begin = csv.field_size_limit(sys.maxsize), 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if column not in header:
            raise _no_column(name, column, header)
        at, begin = header.index(column), reader.line_num + 1
        for fields in reader:
            where = f"{name}, line {begin}"
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{where}: {len(fields)} fields, where the header names {len(header)}",
                    "Put quotes around a field that holds the delimiter or a line break.",
                )
            if fields:
                yield _checked(fields[at], where)
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


def _checked(text: str, where: str) -> str:
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a model that a run has saved")
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="a text (behind -- if it begins with -); or - to read them from standard input, one a line",
    )
    parser.add_argument(
        "--file", type=Path, help="texts to classify: " + ", ".join(_FILE_TYPES) + " (.txt: one a line)"
    )
    parser.add_argument("--text", metavar="COLUMN", help="column of the texts in --file (default: text)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with all probabilities")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to a .csv or .jsonl file")
    parser.add_argument("--top", type=_count, metavar="K", help="give the K most likely labels (default: 1; JSON: all)")
    parser.add_argument("--batch", type=_count, metavar="N", default=32, help="texts of one forward pass (default: 32)")
    parser.add_argument(
        "--max-length",
        type=_count,
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
    texts, total = _texts_of(arguments)
    _silence_libraries()
    classifier = Classifier(saved, device=arguments.device, max_length=arguments.max_length)
    if (arguments.top or 1) > len(classifier.labels):
        raise ConfigError(f"--top {arguments.top}: the model has {len(classifier.labels)} labels", "Ask for fewer.")
    notes = Console(out=sys.stderr)
    if saved.status not in ("", "finished"):
        notes.warn(f"the run ended early ({saved.status}): this is the model as it was then")
    if saved.max_length is None and arguments.max_length is None:
        notes.note(f"texts are cut to {classifier.max_length} tokens, the most this model takes (see --max-length)")
    done = 0
    try:
        with _sink(arguments, classifier, total) as sink, _bar(total) as bar:
            advance = partial(bar.advance, bar.task_ids[0])
            for window in classifier.stream(texts, batch=arguments.batch, on_batch=advance):
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


def _check_options(arguments: Namespace) -> None:
    """Refuse what contradicts itself or cannot take effect."""
    file, output = arguments.file, arguments.output
    if arguments.texts and file:
        raise ConfigError("texts are given both on the command line and in --file", "Give one of the two.")
    if not arguments.texts and not file:
        raise ConfigError(
            "there is no text to classify", 'Write it behind the run in quotes: "some text"; or give --file, or -.'
        )
    if "-" in arguments.texts and len(arguments.texts) > 1:
        raise ConfigError("'-' (standard input) stands beside other texts", "Give one of the two.")
    if file and file.suffix.lower() not in _FILE_TYPES:
        raise ConfigError(f"--file {file} is of no type that can be read", f"Give {', '.join(_FILE_TYPES)}.")
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


def _texts_of(arguments: Namespace) -> tuple[Iterable[str], int | None]:
    """The texts, and how many there are where that is known.

    A file is read twice: a fault in its last line is told before the model is loaded.
    """
    if arguments.file:
        column = "text" if arguments.text is None else arguments.text
        total = sum(1 for _ in read_texts(arguments.file, column))
        if not total:
            raise DataError(f"{arguments.file} has no text", "Fill it.")
        return read_texts(arguments.file, column), total
    if arguments.texts == ["-"]:
        return _text_lines(sys.stdin.buffer, "standard input"), None
    texts = [_checked(text, f"text {number}") for number, text in enumerate(arguments.texts, start=1)]
    return texts, len(texts)


def _silence_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


class _Sink(Protocol):
    """Writes a window in one piece, so that Ctrl-C finds it written or not."""

    def write(self, window: Sequence[Prediction]) -> None: ...


class _JsonLines:
    def __init__(self, out: TextIO, top: int | None) -> None:
        self._out = out
        self._top = top
        self._ascii = not (out.encoding or "").lower().startswith("utf")

    def write(self, window: Sequence[Prediction]) -> None:
        self._out.write("".join(map(self._line, window)))
        self._out.flush()

    def _line(self, found: Prediction) -> str:
        scores = {label: _rounded(score) for label, score in found.top(self._top)}
        line = {"text": found.text, "label": found.label, "score": _rounded(found.score), "scores": scores}
        return json.dumps(line, ensure_ascii=self._ascii) + "\n"


class _Csv:
    def __init__(self, out: TextIO, top: int) -> None:
        self._out = out
        self._top = top
        more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "score")]
        self._write([["text", "label", "score", *more]])

    def write(self, window: Sequence[Prediction]) -> None:
        self._write([found.text, *self._cells(found)] for found in window)

    def _cells(self, found: Prediction) -> Iterator[str | float]:
        for label, score in found.top(self._top):
            yield from (label, _rounded(score))

    def _write(self, rows: Iterable[Sequence[str | float]]) -> None:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        self._out.write(lines.getvalue())
        self._out.flush()


class _Table:
    """One table, however many windows it comes in: its widths are known from the labels and the screen."""

    def __init__(self, out: TextIO, top: int, labels: Sequence[str], total: int | None) -> None:
        if not (out.encoding or "utf-8").lower().startswith("utf") and hasattr(out, "reconfigure"):
            out.reconfigure(errors="replace")  # a character that the screen cannot show must not end the command
        self._out = out
        self._top = top
        self._total = total
        options: dict[str, Any] = {"file": out, "markup": False, "emoji": False, "highlight": False}
        if not out.isatty():
            options |= {"width": PLAIN_WIDTH, "force_terminal": False, "color_system": None}
        self._screen = RichConsole(**options)
        self._label_width = min(_LABEL_WIDTH, max(5, *(cell_len(_shown(label)) for label in labels)))
        self._room = max(10, self._screen.width - self._label_width - 12)
        self._begun = False

    def write(self, window: Sequence[Prediction]) -> None:
        texts = [_shown(found.text) for found in window]
        width = self._room
        if len(window) == self._total:
            width = min(width, max(4, *(cell_len(text) for text in texts)))
        table = Table(box=box.SIMPLE_HEAD, show_header=not self._begun, show_edge=False, pad_edge=False)
        table.add_column("text", width=width, no_wrap=True, overflow="ellipsis")
        table.add_column("label", width=self._label_width, no_wrap=True, overflow="ellipsis", style="bold")
        table.add_column("score", width=6, justify="right")
        for text, found in zip(texts, window, strict=True):
            pairs = found.top(self._top)
            labels = "\n".join(_shown(label) for label, _ in pairs)
            table.add_row(Text(text), Text(labels), "\n".join(f"{score:.4f}" for _, score in pairs))
        self._begun = True
        # Written by hand: rich has its own way with a pipe that was closed.
        with self._screen.capture() as captured:
            self._screen.print(table)
        self._out.write(captured.get())
        self._out.flush()


@contextmanager
def _sink(arguments: Namespace, classifier: Classifier, total: int | None) -> Iterator[_Sink]:
    if not arguments.output:
        table = _Table(sys.stdout, arguments.top or 1, classifier.labels, total)
        yield _JsonLines(sys.stdout, arguments.top) if arguments.json else table
        return
    try:
        with arguments.output.open("w", encoding="utf-8", newline="") as out:
            csv_asked = arguments.output.suffix.lower() == ".csv"
            yield _Csv(out, arguments.top or 1) if csv_asked else _JsonLines(out, arguments.top)
    except OSError as error:
        raise DataError(
            f"--output {arguments.output} cannot be written: {error.strerror}", "Check its folder and the free space."
        ) from error


def _bar(total: int | None) -> Progress:
    """A bar on standard error, for many texts on a terminal; to be stopped while results go to the screen."""
    # Nobody knows how many texts will come through a pipe; while some are being typed, a bar is in the way.
    many = total > TEXTS_FOR_A_BAR if total is not None else not sys.stdin.isatty()
    bar = Progress(
        TextColumn("classifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=RichConsole(stderr=True),
        transient=True,
        disable=not (many and sys.stderr.isatty()),
    )
    bar.add_task("", total=total)
    return bar


def _rounded(score: float) -> float:
    """Six digits: as many as fp32 is good for."""
    return float(f"{score:.6g}")


def _shown(text: str) -> str:
    """On one line, and without control codes, which must not reach the terminal."""
    return _CONTROL.sub("�", " ".join(text.split()))
