"""Recordings with their texts, from wherever they lie to encoded samples in three splits.

A canonical text names a recording by the hash of its file: the same recording under two names is a repeat, and results
are found again wherever the files lie.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import List as ListOf

from toolkit.config import SpeechConfig
from toolkit.data.audio import RATE, SUFFIXES, read_audio
from toolkit.data.examples import Examples, Row, examples
from toolkit.data.files import Part, Role
from toolkit.data.mapping import ROWS_FOR_A_BAR
from toolkit.data.prepared import fingerprint
from toolkit.data.rows import Unfit, canonical_texts, fit_texts, refuse_unfit, rows_of_file, write
from toolkit.data.text_corpus import Place, Rows, TextCorpus, find_places, gather
from toolkit.data.tokenize import tokenizer_fingerprint
from toolkit.errors import DataError

_REVISION = 1
"""To be raised with every change of this module or of `audio` that changes its result: older caches are not used."""
_WHAT = ("recordings with their texts", "name their columns with --data.audio and --data.text")
_FEATURES = Features(
    {
        "audio": Value("large_binary"),
        "tokens": ListOf(Value("int32")),
        "text": Value("string"),
        "seconds": Value("float32"),
        "length": Value("int32"),
    }
)
_ROWS_AT_ONCE = 50
"""Whose samples, up to a megabyte each, are in memory together."""


@dataclass(frozen=True)
class Speech:
    """Recordings with their texts.

    Attributes:
        corpus: canonical texts: `audio`, the hash of a file, and `text`.
        files: where each of them lies now.
    """

    corpus: TextCorpus
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Reading:
    """What a model of speech reads.

    Attributes:
        tokenizer: of the model; its prefix says what language to write.
        positions: of the window that the encoder reads.
        longest: tokens of a text, prefix and end included.
    """

    tokenizer: Any
    positions: int
    longest: int


@dataclass(frozen=True)
class _Source:
    """Rows of one file, or pairs of a recording and a text in a folder.

    Attributes:
        name: for messages.
        folder: from which recordings are named.
        audio, text: columns.
        rows: gives them; in the place of one that cannot be read, why.
        pairs: they are such pairs, and have no numbers.
    """

    name: str
    folder: Path
    audio: str
    text: str
    rows: Callable[[], Iterable[Mapping[str, Any] | Unfit]]
    pairs: bool = False

    def files(self) -> Iterator[Path]:
        """The recordings that are named, whether or not they are there."""
        for row in self.rows():
            if isinstance(row, Mapping) and isinstance(name := row.get(self.audio), str):
                yield self.folder / name


def recordings(config: SpeechConfig) -> Speech:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no recordings with texts.
    """
    places = find_places(config, texts_in="file")
    sources = [source for found in places.values() for place in found for source in _sources(place, config)]
    named = [file for source in sources for file in source.files()]
    there = sorted({file for file in named if file.is_file()})
    with ThreadPoolExecutor(8) as threads:
        digests = dict(zip(there, threads.map(_digest, there), strict=True))
    settings = {
        "kind": "speech",
        "revision": _REVISION,
        **{key: getattr(config, key) for key in ("audio", "text", "max_seconds")},
        "recordings": fingerprint([digests.get(file, "") for file in named]),
    }
    said: dict[str, str] = {}
    read = functools.partial(_read, config=config, digests=digests, said=said)
    corpus = gather(config, read, settings, texts_in="file", words=text_of)
    refuse_unfit(corpus, _WHAT, config.max_bad_rows)
    return Speech(corpus, {digest: file for file, digest in digests.items()})


def encoded(config: SpeechConfig, speech: Speech, reading: Reading) -> Examples:
    """Samples at `audio.RATE` and tokens of every recording; the second call with the same content loads it.

    Returns:
        Columns `audio` (bytes: 16-bit samples), `tokens` (prefix, text, end), `text`, `seconds`, and `length`, which is
        the positions of the window and the tokens.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many texts are too long, or a split has none left.
    """
    tokenizer = tokenizer_fingerprint(reading.tokenizer)
    settings = ["speech", _REVISION, tokenizer, reading.tokenizer.prefix_tokens, reading.positions, reading.longest]
    encode_one = functools.partial(_encode, files=speech.files, reading=reading)
    return examples(config, speech.corpus, encode_one, _FEATURES, settings, rows_at_once=_ROWS_AT_ONCE)


def minutes(data: Examples) -> str:
    """A line of the plan: how much speech each split has."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return ", ".join(f"{np.sum(rows['seconds']) / 60:,.1f} min {name}" for name, rows in splits.items())


def text_of(canonical: str) -> str:
    """What is said."""
    return str(json.loads(canonical)["text"])


def tokens_of(text: str, tokenizer: Any) -> list[int]:
    """Prefix, text and end. Words begin with a space in the vocabulary of a model; what is written without any, not."""
    begins = "" if "⺀" <= text[0] <= "鿿" or "가" <= text[0] <= "힣" else " "
    found: list[int] = tokenizer(begins + text, add_special_tokens=False)["input_ids"]
    return [*tokenizer.prefix_tokens, *found, tokenizer.eos_token_id]


def _sources(place: Place, config: SpeechConfig) -> Iterator[_Source]:
    if not isinstance(place, Part):
        raise DataError(
            f"--data.name {place.name} is no file or folder", "Recordings are read from files: download them first."
        )
    if place.kind == "text":
        folder = place.files[0].parent
        yield _Source(str(folder), folder, "audio", "text", functools.partial(map, _pair, place.files), pairs=True)
    else:
        for file in place.files:
            rows = functools.partial(rows_of_file, file, place.kind)
            yield _Source(str(file), file.parent, config.audio, config.text, rows)


def _pair(file: Path) -> Mapping[str, Any]:
    """A text and the recording beside it."""
    beside = (file.with_suffix(suffix) for suffix in SUFFIXES)
    audio = next((found for found in beside if found.is_file()), file.with_suffix(SUFFIXES[0]))
    return {"audio": str(audio.absolute()), "text": file.read_text(encoding="utf-8-sig")}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(
    place: Place, role: Role, scratch: Path, config: SpeechConfig, digests: Mapping[Path, str], said: dict[str, str]
) -> Iterator[Rows]:
    for source in _sources(place, config):
        canonical = functools.partial(_canonical, source=source, config=config, digests=digests, said=said)
        texts = functools.partial(canonical_texts, source.name, source.rows, canonical, _WHAT, config)
        yield fit_texts(source.name, texts, scratch, bar=len(digests) >= ROWS_FOR_A_BAR // 10)


def _canonical(
    row: Mapping[str, Any], source: _Source, config: SpeechConfig, digests: Mapping[Path, str], said: dict[str, str]
) -> str:
    name, text = row.get(source.audio), row.get(source.text)
    try:
        if not isinstance(name, str) or not name:
            raise Unfit(f"their column '{source.audio}' names no file")
        if not isinstance(text, str) or not any(map(str.isalnum, text)):
            raise Unfit(f"their column '{source.text}' has no words")
        heard = read_audio(source.folder / name)
        if len(heard) > config.max_seconds * RATE:
            raise Unfit(f"their recording is longer than --data.max_seconds {config.max_seconds}")
        digest, words = digests[source.folder / name], " ".join(text.split())
        if said.setdefault(digest, words) != words:
            raise Unfit("their recording has another text in an earlier row")
    except Unfit as reason:
        # A row of a file is found by its number.
        raise Unfit(f"{reason}: {Path(str(name)).stem}" if source.pairs else str(reason)) from None
    return write({"audio": digest, "text": words})


def _encode(content: Mapping[str, str], files: Mapping[str, Path], reading: Reading) -> Sequence[Row]:
    samples, text = read_audio(files[content["audio"]]), content["text"]
    tokens = tokens_of(text, reading.tokenizer)
    if len(tokens) > reading.longest:
        raise Unfit(f"their text has more than the {reading.longest} tokens that the model can write")
    return [
        {
            "audio": samples.tobytes(),
            "tokens": tokens,
            "text": text,
            "seconds": len(samples) / RATE,
            "length": reading.positions + len(tokens),
        }
    ]
