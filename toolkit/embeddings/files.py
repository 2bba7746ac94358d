"""Files of word vectors, as word2vec and GloVe write them: read word by word, and only what is wanted is kept."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolkit.errors import DataError

Vector = npt.NDArray[np.float32]
SUFFIXES = (".txt", ".vec", ".bin", ".gz")
"""Of files that `read_vectors` reads."""
_LONGEST_WORD = 4096
_CHUNK = 2**20


@dataclass(frozen=True)
class FileVectors:
    """What was kept of a file.

    Attributes:
        words: that are wanted and there, in the order of the file.
        vectors: of each, (words, features) in fp32.
        read: words in the file.
        repeated: of those, how many stood earlier; the first counts.
        undecodable: of those, how many are not UTF-8, and are left out.
    """

    words: list[str]
    vectors: Vector
    read: int
    repeated: int
    undecodable: int


def read_vectors(
    file: Path, wanted: Callable[[str], bool], on_bytes: Callable[[int], None] = lambda done: None
) -> FileVectors:
    """Read a file of word vectors once, from its beginning to its end.

    Text has a word a line, and its numbers behind spaces; a first line with the number of words and of features (as
    word2vec and fastText write it) is checked against the rest. Binary (.bin) has such a line, and then each word, a
    space and its numbers as little-endian float32. Both may be gzipped.

    Args:
        file: the name ends with .bin (.bin.gz) where it is binary.
        wanted: which words to keep.
        on_bytes: told from time to time how many bytes of the file have been read.

    Raises:
        DataError: it cannot be read, or is malformed; the line or the number of the word is told.
    """
    names = file.name.lower().removesuffix(".gz")
    try:
        with file.open("rb") as raw:
            packed = file.name.lower().endswith(".gz")
            stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            entries = _binary(stream, file) if names.endswith(".bin") else _text(stream, file)
            return _kept(entries, wanted, lambda: on_bytes(raw.tell()), file)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file} cannot be read: {reason}", "Check the path, or get the file again.") from error


Entry = tuple[bytes, "Vector | list[bytes]", str]
"""A word, its numbers (of a text file as they are written), and where it stands."""


def _kept(entries: Iterator[Entry], wanted: Callable[[str], bool], beat: Callable[[], None], file: Path) -> FileVectors:
    words: dict[str, Vector] = {}
    seen: set[bytes] = set()
    read = repeated = undecodable = 0
    for name, numbers, where in entries:
        read += 1
        if read % 10_000 == 0:
            beat()
        if name in seen:
            repeated += 1
            continue
        seen.add(name)
        try:
            word = name.decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if wanted(word):
            words[word] = _numbers(numbers, where)
    if not read:
        raise DataError(f"{file} has no vectors", "A line has a word and its numbers, with spaces between them.")
    table = np.stack(list(words.values())) if words else np.zeros((0, 0), np.float32)
    return FileVectors(list(words), table, read, repeated, undecodable)


def _numbers(numbers: Vector | list[bytes], where: str) -> Vector:
    try:
        vector = np.asarray(numbers, dtype=np.float32) if isinstance(numbers, np.ndarray) else _parsed(numbers)
    except ValueError as error:
        raise DataError(f"{where}: {error}", "Get the file again, or mend that line.") from error
    if not np.isfinite(vector).all():
        raise DataError(f"{where}: a number is not finite", "Get the file again, or take that word out of it.")
    return vector


def _parsed(fields: list[bytes]) -> Vector:
    return np.array([float(field) for field in fields], dtype=np.float32)


def _text(stream: BinaryIO, file: Path) -> Iterator[Entry]:
    promised: int | None = None
    features: int | None = None
    found = 0
    for number, line in enumerate(stream, start=1):
        fields = line.split()
        where = f"{file}, line {number}"
        if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
            promised, features = int(fields[0]), int(fields[1])
            continue
        if features is None:
            features = len(fields) - 1
        if features < 1 or len(fields) <= features:
            raise DataError(
                f"{where}: {max(0, len(fields) - 1)} numbers behind a word, where "
                f"{'there must be some' if features < 1 else f'{features} are due'}",
                "Is it a file of word vectors? Get it again, or mend that line.",
            )
        # A few words of well-known files have spaces in them.
        yield b" ".join(fields[:-features]), fields[-features:], where
        found += 1
    if promised is not None and found != promised:
        raise DataError(
            f"{file} has {found:,} words, and its first line promises {promised:,}", "It may be cut off: get it again."
        )


def _binary(stream: BinaryIO, file: Path) -> Iterator[Entry]:
    header = stream.readline(100).split()
    if len(header) != 2 or not all(field.isdigit() for field in header) or not all(map(int, header)):
        raise DataError(
            f"{file} does not begin with a number of words and of features, as word2vec writes it",
            "Let the name of a file of text end with .txt or .vec.",
        )
    count, features = map(int, header)
    reader, length = _Buffered(stream), 4 * features
    for number in range(1, count + 1):
        where = f"{file}, word {number} of {count}"
        word = reader.until(b" ", where).lstrip(b"\n")
        numbers = reader.take(length, where)
        yield word, np.frombuffer(numbers, "<f4"), where
    if rest := reader.rest().strip(b"\n"):
        raise DataError(
            f"{file} has {len(rest)} bytes or more behind the {count} words that its first line promises",
            "Are its numbers float32, and as many as that line says? Get it again.",
        )


class _Buffered:
    """Words and numbers out of a stream, a megabyte at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._buffer, self._at = b"", 0

    def until(self, mark: bytes, where: str) -> bytes:
        """What stands before the next mark, which is passed over."""
        while (end := self._buffer.find(mark, self._at)) < 0:
            if len(self._buffer) - self._at > _LONGEST_WORD or not self._more():
                raise DataError(f"{where}: there is no end of the word", "It may be cut off or another kind of file.")
        found, self._at = self._buffer[self._at : end], end + len(mark)
        return found

    def take(self, length: int, where: str) -> bytes:
        """So many bytes."""
        while len(self._buffer) - self._at < length:
            if not self._more():
                raise DataError(f"{where}: its numbers are cut off", "Get the file again.")
        found, self._at = self._buffer[self._at : self._at + length], self._at + length
        return found

    def rest(self) -> bytes:
        """The next bytes, if there are any."""
        self._more()
        return self._buffer[self._at :]

    def _more(self) -> bool:
        chunk = self._stream.read(_CHUNK)
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return bool(chunk)
