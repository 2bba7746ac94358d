"""What must be mended or refused before any split: missing values, labels that are none, repeats, leaks.

All functions work on one numbering of the rows. `roles` says for each row which split it belongs to (an index into
`ROLES`), or `DROPPED`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value

from toolkit.config import TextDataConfig
from toolkit.data.files import ROLES
from toolkit.data.mapping import map_texts
from toolkit.data.sources import Corpus
from toolkit.errors import DataError

Roles = npt.NDArray[np.int8]
Codes = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

DROPPED = -1
TRAIN, VALIDATION, TEST = range(3)
MOST_MISSING = 0.05
"""Larger shares of missing texts or labels are a mistake in the data, not a blemish."""

_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Places(Protocol):
    """Rows that errors can name."""

    def where(self, row: int) -> str:
        """Where a row stands, in the words of its source."""


@dataclass(frozen=True)
class Keyed:
    """What the texts are for the purpose of comparing them.

    Attributes:
        keys: 128-bit hash of each normalised text, two words a row.
        blank: which texts are null or nothing but white space.
    """

    keys: Keys
    blank: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cleaned:
    """Rows that are fit to be split.

    Attributes:
        roles: the split of each row, or `DROPPED`.
        codes: class of each row that is kept, as an index into `labels`.
        labels: names of the classes, sorted.
        keys: from `key_texts`.
        groups: from `group_texts`.
        dropped: how many rows, by reason.
        warnings: for the user.
    """

    roles: Roles
    codes: Codes
    labels: tuple[str, ...]
    keys: Keys
    groups: Rows
    dropped: Mapping[str, int]
    warnings: tuple[str, ...]


def clean(corpus: Corpus, config: TextDataConfig, scratch: Path, note: Callable[[str, Roles], None]) -> Cleaned:
    """Drop rows without text or label, repeats, contradictions and leaks; refuse what no cleaning can mend.

    Args:
        corpus: what was read.
        config: which columns, and whether repeats go.
        scratch: folder for what is made on the way.
        note: told the roles after each stage.

    Raises:
        DataError: too much is missing, the labels are no classes, or a split has classes of its own.
    """
    keyed = key_texts(corpus.texts, config.tokenize_processes, scratch)
    codes, names = code_labels(corpus.labels)
    roles, (no_text, no_label) = drop_missing(corpus, codes, keyed.blank)
    note("without a text or a label", roles)
    check_labels(codes[roles != DROPPED], names, config.label)
    before = np.unique(codes[roles == TRAIN])
    groups = group_texts(keyed.keys)
    duplicates = conflicts = 0
    if config.deduplicate:
        roles, duplicates, conflicts = drop_repeats(roles, groups, codes)
        note("repeats, and texts under two labels", roles)
    roles, leaks = drop_leaks(roles, groups)
    note("in a split that is tested on", roles)
    classes = check_classes(corpus, roles, codes, names)
    dropped = {
        "text_nulls_dropped": no_text,
        "label_nulls_dropped": no_label,
        "duplicates_dropped": duplicates,
        "conflicts_dropped": conflicts,
        "leaks_dropped": leaks["train"],
        "validation_rows_in_test_dropped": leaks["validation"],
    }
    lost = [names[code] for code in before if code not in classes]
    notes = [*_repeated(roles, groups), *(f"class '{name}' has no row left after cleaning" for name in lost)]
    new_code = np.full(len(names) + 1, -1, np.int32)
    new_code[classes] = np.arange(len(classes))
    return Cleaned(
        roles=roles,
        codes=new_code[codes],
        labels=tuple(names[code] for code in classes),
        keys=keyed.keys,
        groups=groups,
        dropped=dropped,
        warnings=(*_warnings(dropped), *notes),
    )


def _warnings(dropped: Mapping[str, int]) -> list[str]:
    told = {
        "text_nulls_dropped": "rows without a text were dropped",
        "label_nulls_dropped": "rows without a label were dropped",
        "duplicates_dropped": "training rows were dropped because their text stands in an earlier row",
        "conflicts_dropped": "training rows were dropped because their text stands under two labels",
        "leaks_dropped": "training rows were dropped because their text is also in validation or test",
        "validation_rows_in_test_dropped": "validation rows were dropped because their text is also in test",
    }
    return [f"{dropped[key]} {text}" for key, text in told.items() if dropped[key]]


def _repeated(roles: Roles, groups: Rows) -> list[str]:
    """Given splits are scored as they are, repeats included, as everybody else scores them."""
    counts = {role: (int(np.sum(roles == role)), len(np.unique(groups[roles == role]))) for role in (VALIDATION, TEST)}
    return [
        f"{rows - texts} rows of the {ROLES[role]} split repeat the text of another one; they are kept"
        for role, (rows, texts) in counts.items()
        if rows > texts
    ]


def normalised(text: str) -> str:
    """A text as it is compared: NFC, stripped, every run of white space one blank."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def key_texts(texts: Dataset, processes: int | None, scratch: Path) -> Keyed:
    """Hash every text in its normalised form."""
    features = Features({"high": Value("uint64"), "low": Value("uint64"), "blank": Value("bool")})
    table = map_texts(texts, _keys, features, processes=processes, scratch=scratch, title="Comparing texts")
    columns = table.with_format("arrow")[:]
    keys = np.stack([columns.column(name).to_numpy() for name in ("high", "low")], axis=1)
    return Keyed(keys, columns.column("blank").to_numpy())


def _keys(texts: list[str | None]) -> dict[str, Any]:
    plain = [normalised(text or "") for text in texts]
    words = hashed(plain)
    return {"high": words[:, 0], "low": words[:, 1], "blank": [not text for text in plain]}


def hashed(texts: Iterable[str]) -> Keys:
    """128 bits for each text as it is, in two words: the same on every machine."""
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
    )
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


def group_texts(keys: Keys) -> Rows:
    """A number for each row; two rows have the same one if, and only if, their texts are the same."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    changes = np.any(keys[order][1:] != keys[order][:-1], axis=1)
    groups = np.empty(len(keys), np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(changes)])
    return groups


def code_labels(labels: pa.ChunkedArray) -> tuple[Codes, list[str]]:
    """Labels as indices into names; −1 where there is none. `1.0` is read as `1`, and outer white space dropped."""
    coded = pa.concat_arrays(labels.dictionary_encode().unify_dictionaries().chunks)
    words = [_canonical(word) for word in coded.dictionary.to_pylist()]
    names = sort_labels({word for word in words if word})
    code_of = {name: code for code, name in enumerate(names)}
    of_word = np.array([code_of.get(word, -1) for word in words] + [-1], np.int32)
    codes = pc.fill_null(coded.indices, len(words)).to_numpy(zero_copy_only=False)
    return of_word[codes], names


def _canonical(word: str) -> str:
    word = word.strip()
    return str(int(float(word))) if "." in word and _INTEGER.fullmatch(word) else word


def sort_labels(words: set[str]) -> list[str]:
    """As numbers, if all of them are integers."""
    if all(_INTEGER.fullmatch(word) for word in words):
        # The word itself settles the order of `1` and `01`: that of a set differs from process to process.
        return sorted(words, key=lambda word: (int(word), word))
    return sorted(words)


def drop_missing(corpus: Corpus, codes: Codes, blank: npt.NDArray[np.bool_]) -> tuple[Roles, list[int]]:
    """Drop rows without a text or a label.

    Returns:
        The new roles; how many were dropped for their text, and how many others for their label.

    Raises:
        DataError: more than 5 % of a split are such rows.
    """
    faults = (("text", blank), ("label", (codes < 0) & ~blank))
    counts = []
    for column, faulty in faults:
        for role, name in enumerate(ROLES):
            rows = np.flatnonzero(faulty & (corpus.roles == role))
            total = int(np.sum(corpus.roles == role))
            if len(rows) > MOST_MISSING * total:
                raise DataError(
                    f"{len(rows)} of {total} rows of the {name} split ({len(rows) / total:.0%}) have no {column}: "
                    f"{', '.join(corpus.where(int(row)) for row in rows[:3])}{' …' if len(rows) > 3 else ''}",
                    f"Fill or remove them, or name another column with --data.{column}. "
                    f"Up to {MOST_MISSING:.0%} are dropped with a warning.",
                )
        counts.append(int(faulty.sum()))
    return np.where(blank | (codes < 0), DROPPED, corpus.roles).astype(np.int8), counts


def check_labels(codes: Codes, names: list[str], column: str) -> None:
    """Refuse labels that are not classes. `codes` are those of the rows that are kept.

    Raises:
        DataError: there are no rows, or the labels are measurements or look like identifiers.
    """
    if not len(codes):
        raise DataError("the data has no rows", "Give it some.")
    present = [names[code] for code in np.unique(codes)]
    if all(_NUMBER.fullmatch(name) for name in present) and not all(_INTEGER.fullmatch(name) for name in present):
        shown = ", ".join([name for name in present if not _INTEGER.fullmatch(name)][:4])
        raise DataError(
            f"column '{column}' holds measurements ({shown} …), which is regression, not classification",
            "Learn numbers with --data.target number, or name the column of the classes with --data.label; if these "
            "are classes after all, write them as words.",
        )
    if len(present) * 2 > len(codes):
        raise DataError(
            f"column '{column}' has {len(present)} classes in {len(codes)} rows ({', '.join(present[:4])} …): "
            "probably an identifier, not a class",
            "Name the column of the classes with --data.label.",
        )


def drop_repeats(roles: Roles, groups: Rows, codes: Codes) -> tuple[Roles, int, int]:
    """Keep the first of equal texts of the training data, and none of those that stand under two labels.

    Returns:
        The new roles, and how many rows were dropped as duplicates and as conflicts.
    """
    rows = np.flatnonzero(roles == TRAIN)
    if not len(rows):
        return roles, 0, 0
    group, code = groups[rows], codes[rows]
    first_row, first_code = np.full((2, groups.max() + 1), -1, np.int64)
    # Written backwards, so that the first row of a group is the last to be written.
    first_row[group[::-1]], first_code[group[::-1]] = rows[::-1], code[::-1]
    torn = np.zeros(len(first_row), np.bool_)
    torn[group[code != first_code[group]]] = True
    conflict = torn[group]
    duplicate = (rows != first_row[group]) & ~conflict
    result = roles.copy()
    result[rows[conflict | duplicate]] = DROPPED
    return result, int(duplicate.sum()), int(conflict.sum())


def drop_leaks(roles: Roles, groups: Rows) -> tuple[Roles, dict[str, int]]:
    """Drop training rows whose text is also in validation or test, and validation rows that are also in test.

    The test split is never touched: its figures stay comparable with those of others.

    Returns:
        The new roles, and how many rows `train` and `validation` lost.
    """
    result, lost = roles.copy(), {}
    for role, name, others in ((VALIDATION, "validation", (TEST,)), (TRAIN, "train", (VALIDATION, TEST))):
        held_out = np.isin(groups, groups[np.isin(roles, others)])
        leak = (roles == role) & held_out
        result[leak] = DROPPED
        lost[name] = int(leak.sum())
    return result, lost


def check_classes(corpus: Places, roles: Roles, codes: Codes, names: list[str]) -> list[int]:
    """The classes of the training data, as indices into `names`.

    Raises:
        DataError: there is only one, or validation or test has another one.
    """
    trained = np.unique(codes[roles == TRAIN])
    for role in (VALIDATION, TEST):
        strange = np.flatnonzero((roles == role) & ~np.isin(codes, trained))
        if len(strange):
            classes = ", ".join(f"'{names[code]}'" for code in np.unique(codes[strange])[:5])
            raise DataError(
                f"the {ROLES[role]} split has rows of class {classes}, of which the training data has none "
                f"({len(strange)} rows, first {corpus.where(int(strange[0]))})",
                "Correct the spelling of the labels, remove these rows, or add training rows of that class.",
            )
    if len(trained) < 2:
        listed = f": '{names[trained[0]]}'" if len(trained) else ""
        raise DataError(
            f"the training data has {len(trained)} class{'' if len(trained) == 1 else 'es'}{listed}; it takes two",
            "Name the column of the classes with --data.label, or add rows of another class.",
        )
    return [int(code) for code in trained]
