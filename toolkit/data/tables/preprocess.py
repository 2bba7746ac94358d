"""Cells to numbers and categories, by what the training rows say; kept as plain JSON beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toolkit.config import TableConfig
from toolkit.data.tables.columns import Coded, Floats, Kind, code, guess, parse, parts, what
from toolkit.data.tables.target import TargetScale
from toolkit.errors import ConfigError, ModelError, nearest

FILE = "table.json"
UNKNOWN, ABSENT = 0, 1
"""Categories of each column that stand for words that training does not know, and for empty cells."""
_QUANTILES = 1001
_TAIL = 1e-5
"""Ranks end so far from 0 and 1: the normal distribution has no place for those themselves."""


@dataclass(frozen=True)
class Number:
    """How a number of a column is read.

    Attributes:
        column, part: of the table, and which of the numbers in its words.
        name: for people.
        fill: stands where there is none.
        fences: (low, high), beyond which a number is an outlier; None where there are none.
        marked: whether a number beside it says that there was none.
        mean, deviation: of the training rows.
        quantiles: of the training rows, from the lowest to the highest; none where ranks are not used.
    """

    column: str
    part: int
    name: str
    fill: float
    fences: tuple[float, float] | None
    marked: bool
    mean: float
    deviation: float
    quantiles: tuple[float, ...] = ()

    def scaled(self, values: Floats) -> Floats:
        """Values without NaN: less the mean, over the deviation, or by rank."""
        if not self.quantiles:
            return (values - self.mean) / self.deviation
        at, ranks = np.array(self.quantiles), np.linspace(0, 1, len(self.quantiles))
        # From below and from above: a value that is many quantiles at once lies in the middle of its ranks.
        rank = (np.interp(values, at, ranks) - np.interp(-values, -at[::-1], -ranks[::-1])) / 2
        scaled: Floats = torch.special.ndtri(torch.from_numpy(rank.clip(_TAIL, 1 - _TAIL))).numpy()
        return scaled


@dataclass(frozen=True)
class Encoded:
    """Rows as a network reads them.

    Attributes:
        numbers: (rows, numbers) fp32.
        categories: (rows, columns) int32.
        faults: why a row cannot be read, by its index.
        missing: whether a cell of the row is empty.
        outlier: whether a number of the row is one.
    """

    numbers: npt.NDArray[np.float32]
    categories: npt.NDArray[np.int32]
    faults: dict[int, str]
    missing: npt.NDArray[np.bool_]
    outlier: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Preprocessor:
    """All that was learnt of the training rows before training.

    Attributes:
        target: column that is predicted.
        labels: its classes, by index; none for a measurement.
        scale: of a measurement; None for classes.
        kinds: of each column that is read.
        numbers: in the order of a network's inputs, each before its mark.
        categories: words of each column by index, behind those that stand for unknown and empty.
        clip: whether outliers are moved to the fences.
        missing_values: what stands in an empty cell.
    """

    target: str
    labels: tuple[str, ...]
    scale: TargetScale | None
    kinds: dict[str, Kind]
    numbers: tuple[Number, ...]
    categories: dict[str, tuple[str, ...]]
    clip: bool
    missing_values: tuple[str, ...]

    @property
    def number_count(self) -> int:
        """Numbers of a row, with the marks of missing ones."""
        return sum(1 + number.marked for number in self.numbers)

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """Categories of each column, with those that stand for unknown and empty."""
        return tuple(2 + len(words) for words in self.categories.values())

    def encode(self, cells: Mapping[str, Any]) -> Encoded:
        """Columns of strings or nulls (Arrow) as a network reads them; what is not read may be among them."""
        coded = {name: code(cells[name], self.missing_values) for name in self.kinds}
        rows = len(next(iter(coded.values())).codes)
        numbers = np.empty((rows, self.number_count), np.float32)
        missing, outlier = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
        faults: dict[int, str] = {}
        values = {name: _values(kind, coded[name]) for name, kind in self.kinds.items() if kind != "categorical"}
        for name, found in values.items():
            for row in np.flatnonzero(np.isnan(found[:, 0]) & (coded[name].codes >= 0)).tolist():
                word = coded[name].words[coded[name].codes[row]]
                faults.setdefault(row, f"'{name}' is {word!r:.40}, not {what(self.kinds[name])}")
        place = 0
        for number in self.numbers:
            column = values[number.column][:, number.part]
            absent = np.isnan(column)
            missing |= absent
            filled = np.where(absent, number.fill, column)
            if number.fences is not None:
                within = filled.clip(*number.fences)
                outlier |= within != filled
                filled = within if self.clip else filled
            numbers[:, place] = number.scaled(filled)
            if number.marked:
                numbers[:, place + 1] = absent
            place += 1 + number.marked
        categories = np.empty((rows, len(self.categories)), np.int32)
        for place, (name, words) in enumerate(self.categories.items()):
            index = {word: number for number, word in enumerate(words, start=2)}
            of_word = np.array([index.get(word, UNKNOWN) for word in coded[name].words] + [ABSENT], np.int32)
            categories[:, place] = of_word[coded[name].codes]  # -1 is the last
            missing |= coded[name].codes < 0
        return Encoded(numbers, categories, faults, missing, outlier)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it beside a model, as plain JSON."""
        content = {"format": 1, **asdict(self)}
        (Path(folder) / FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocessor:
        """The same again."""
        values = dict(content)
        return cls(
            target=values["target"],
            labels=tuple(values["labels"]),
            scale=TargetScale(**values["scale"]) if values["scale"] else None,
            kinds=values["kinds"],
            numbers=tuple(_number(one) for one in values["numbers"]),
            categories={name: tuple(words) for name, words in values["categories"].items()},
            clip=values["clip"],
            missing_values=tuple(values["missing_values"]),
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> Preprocessor:
        """Read it from beside a model.

        Raises:
            ModelError: it is not there, or damaged.
        """
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
            content.pop("format")
            return cls.from_json(content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{folder / FILE} does not say how the columns are to be read: {error}",
                "Copy the model again, or train again.",
            ) from error


def _number(content: Mapping[str, Any]) -> Number:
    fences = content["fences"]
    return Number(
        **{**content, "quantiles": tuple(content["quantiles"]), "fences": None if fences is None else tuple(fences)}
    )


def fit(
    columns: Mapping[str, Coded], config: TableConfig, labels: tuple[str, ...], scale: TargetScale | None
) -> tuple[Preprocessor, dict[str, Any]]:
    """What the training rows, and they alone, say of their columns.

    Args:
        columns: of the training rows, without the target.
        config: how they are read.
        labels, scale: of the target.

    Returns:
        The preprocessor, and what is told: `left_out` (why, by column), `missing` and `outliers` (cells, by name).

    Raises:
        ConfigError: a setting names a column that is not there, or one twice.
    """
    asked = _asked(columns, config)
    kinds: dict[str, Kind] = {}
    numbers: list[Number] = []
    categories: dict[str, tuple[str, ...]] = {}
    facts: dict[str, Any] = {"left_out": {}, "missing": {}, "outliers": {}}
    for name, coded in columns.items():
        kind, why = asked.get(name) or guess(coded.words, coded.counts())
        if kind == "left out":
            facts["left_out"][name] = why
            continue
        if absent := int(np.sum(coded.codes < 0)):
            facts["missing"][name] = absent
        if kind == "categorical":
            kinds[name], categories[name] = kind, _known_words(coded, config.rare)
            continue
        found = _numbers(name, kind, coded, config, facts)
        if not found:
            facts["left_out"][name] = "the same in all training rows"
            continue
        kinds[name] = kind
        numbers += found
    clip = config.outliers == "clip"
    result = Preprocessor(
        config.target, labels, scale, kinds, tuple(numbers), categories, clip, tuple(config.missing_values)
    )
    return result, facts


def _asked(columns: Mapping[str, Coded], config: TableConfig) -> dict[str, tuple[Kind, str]]:
    """The kinds that the settings give."""
    found: dict[str, tuple[Kind, str]] = {}
    settings: dict[str, Kind] = {"numeric": "numeric", "categorical": "categorical", "boolean": "boolean"}
    for key, kind in (settings | {"dates": "date", "drop": "left out"}).items():
        for name in getattr(config, key):
            if name not in columns:
                of_target = name in (config.target, config.group)
                raise ConfigError(
                    f"--data.{key} {name}: "
                    + ("it is not learnt from" if of_target else f"no such column.{nearest(name, columns)}"),
                    f"Columns: {', '.join(columns)}.",
                )
            if name in found:
                raise ConfigError(f"column '{name}' is given two kinds", "Name it once.")
            found[name] = (kind, "as asked")
    return found


def _known_words(coded: Coded, rare: int) -> tuple[str, ...]:
    return tuple(sorted(word for word, count in zip(coded.words, coded.counts(), strict=True) if count >= rare))


def _values(kind: Kind, coded: Coded) -> Floats:
    """The numbers of each row, (rows, parts); NaN where there is none."""
    of_word = np.concatenate([parse(kind, coded.words), np.full((1, len(parts(kind))), np.nan)])
    found: Floats = of_word[coded.codes]  # -1 is the last
    return found


def _numbers(name: str, kind: Kind, coded: Coded, config: TableConfig, facts: dict[str, Any]) -> list[Number]:
    """Those of a column that are not the same in all rows."""
    found = []
    all_values = _values(kind, coded)
    if coded.words and np.isnan(all_values).all():
        raise ConfigError(
            f"column '{name}' is to be {what(kind)} in each row, and no word of it is one: {coded.words[0]!r:.40}",
            "Give it another kind, or let it be found: see --help for --data.numeric and its neighbours.",
        )
    for part, word in enumerate(parts(kind)):
        values = all_values[:, part]
        there = values[~np.isnan(values)]
        marked = part == 0 and bool(np.any(coded.codes < 0))
        if not len(there) or (there.min() == there.max() and not marked):
            continue
        title = f"{name} {word}".strip()
        quartile, median, third = np.quantile(there, (0.25, 0.5, 0.75)).tolist()
        fences, room = None, config.fence * (third - quartile)
        # A column that is mostly one value has no range by which others could be judged.
        if kind == "numeric" and room:
            fences = (quartile - room, third + room)
            if outliers := int(np.sum((there < fences[0]) | (there > fences[1]))):
                facts["outliers"][title] = outliers
        ranked = config.scaling == "quantile" and kind != "boolean"
        found.append(
            Number(
                column=name,
                part=part,
                name=title,
                fill=median,
                fences=fences,
                marked=marked,
                mean=float(there.mean()),
                deviation=float(there.std()) or 1.0,
                quantiles=tuple(np.quantile(there, np.linspace(0, 1, _QUANTILES)).tolist()) if ranked else (),
            )
        )
    return found
