"""`toolkit data back-translate`: training texts in other words, translated to another language and back.

Sennrich, Haddow and Birch 2016; for few labelled texts, Xie et al. 2020 (UDA). The models are runs of
`recipes/translate.py`. The result is what `--augment.paraphrases` of `recipes/bert_cls.py` takes.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import Progress

from toolkit.arguments import whole
from toolkit.errors import ConfigError, DataError, ModelError
from toolkit.normalise import normalise
from toolkit.predict import SavedModel, find_model, read_texts
from toolkit.predict.command import silence_libraries
from toolkit.predict.kinds import TRANSLATOR, Answerer, load_answerer
from toolkit.report import Console
from toolkit.text_files import FILE_TYPES

_BATCH = 32


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("file", metavar="FILE", type=Path, help=f"texts: {', '.join(FILE_TYPES)}")
    parser.add_argument("there", metavar="THERE", type=Path, help="run that translates them to another language")
    parser.add_argument("back", metavar="BACK", type=Path, help="run that translates that language back")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help=".jsonl or .csv file to write; must be new")
    parser.add_argument("--text", metavar="COLUMN", help="column of the texts (default: text)")
    parser.add_argument("--batch", type=whole(1), default=_BATCH, help=f"texts of one forward pass (default: {_BATCH})")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def run(arguments: Namespace) -> int:
    """`toolkit data back-translate`; after Ctrl-C, what has been written is whole.

    Raises:
        ToolkitError: a mistake of the user.
    """
    file, output = arguments.file, arguments.output
    if file.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"{file} is of no type that can be read", f"Give {', '.join(FILE_TYPES)}.")
    if file.suffix.lower() == ".txt" and arguments.text:
        raise ConfigError(f"--text {arguments.text} has no effect on a .txt file", "Drop it.")
    if output.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"{output} is of no type that can be written", "Name a .csv or a .jsonl file.")
    if output.exists() or not output.parent.is_dir():
        why = "is there already" if output.exists() else "lies in no folder that is there"
        raise ConfigError(f"{output} {why}", "Name another file.")
    column = arguments.text or "text"
    total = sum(1 for _ in read_texts(file, column))
    if not total:
        raise DataError(f"{file} has no text", "Fill it.")
    silence_libraries()
    found = [_find(path) for path in (arguments.there, arguments.back)]
    there, back = (Translation(load_answerer(one.kind, one, device=arguments.device), one.normalise) for one in found)
    changed = 0
    with output.open("w", encoding="utf-8", newline="") as out, Progress(console=RichConsole(stderr=True)) as bar:
        table, task = csv.writer(out, lineterminator="\n"), bar.add_task("translating", total=total)
        if output.suffix.lower() == ".csv":
            table.writerow(("text", "paraphrase"))
        for text, other in paraphrases(read_texts(file, column), there, back, batch=arguments.batch):
            bar.advance(task)
            if not other or other == text:
                continue
            changed += 1
            if output.suffix.lower() == ".csv":
                table.writerow((text, other))
            else:
                print(json.dumps({"text": text, "paraphrase": other}, ensure_ascii=False), file=out)
            out.flush()
    Console(out=sys.stderr).note(f"{changed:,} of {total:,} texts in other words: {output}")
    return 0


class Translation:
    """A saved encoder–decoder, with the form that its run brought texts into.

    Args:
        answerer: the model.
        steps: to that form.
    """

    def __init__(self, answerer: Answerer, steps: tuple[str, ...]) -> None:
        self._answerer = answerer
        self._steps = steps

    def __call__(self, texts: Iterable[str], batch: int) -> list[str]:
        """What it writes for each; nothing for nothing."""
        rows = [normalise(text, self._steps) for text in texts]  # type: ignore[arg-type]  # checked by its run
        asked = [text for text in rows if text.strip()]
        answers = (answer for window in self._answerer.stream(asked, batch=batch) for answer in window)
        return [str(next(answers).fields["written"]) if text.strip() else "" for text in rows]


def paraphrases(
    texts: Iterable[str], there: Translation, back: Translation, *, batch: int
) -> Iterator[tuple[str, str]]:
    """Each text with what comes back of it."""
    rest = iter(texts)
    while window := list(islice(rest, batch)):
        yield from zip(window, back(there(window, batch), batch), strict=True)


def _find(run: Path) -> SavedModel:
    saved = find_model(run)
    if saved.kind is not TRANSLATOR:
        raise ModelError(
            f"the model of {run} is {saved.kind.about}, not one that translates",
            "Name a run of recipes/translate.py.",
        )
    return saved
