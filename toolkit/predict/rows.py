"""Saved models that answer rows: of a table, or histories of items. Imports torch, which takes seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch

from toolkit.data.tables import Catalogue, Preprocessor
from toolkit.data.tables.reading import word
from toolkit.errors import ConfigError, DataError, NumericsError, nearest
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, load_network
from toolkit.predict.saved import SavedModel

Row = Mapping[str, Any]


class TableAnswers:
    """A saved network of tables as `toolkit predict` asks it: rows of raw values in, the target out.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        top: of a class, how many are named with their probabilities (default: all).
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", top: int | None = None) -> None:
        self._preprocessor = Preprocessor.from_pretrained(saved.folder)
        labels = self._preprocessor.labels
        if top is not None and top > len(labels):
            told = f"the model has {len(labels)} classes" if labels else "the model predicts a measurement, no class"
            raise ConfigError(f"--top {top}: {told}", "Ask for fewer." if labels else "Drop it.")
        self._top = top
        place = choose_device(device)
        self._model = load_network(saved.folder).to(place).eval()

    def stream(self, inputs: Iterable[Row], *, batch: int) -> Iterator[list[Answer]]:
        """The target of each row."""
        rest, begin = iter(inputs), 1
        while window := list(islice(rest, batch)):
            yield self._answer(window, begin)
            begin += len(window)

    @torch.inference_mode()
    def _answer(self, rows: Sequence[Row], begin: int) -> list[Answer]:
        reading = self._preprocessor
        cells = {name: pa.array(_column(rows, name, begin), pa.string()) for name in reading.kinds}
        encoded = reading.encode(cells)
        for row, why in encoded.faults.items():
            raise DataError(f"row {begin + row}: {why}", "Mend it, or write null for a value that is not known.")
        device = self._model.device
        numbers = torch.from_numpy(encoded.numbers).to(device)
        categories = torch.from_numpy(encoded.categories).long().to(device)
        logits = _finite(self._model(numbers=numbers, categories=categories).logits.float())
        if reading.scale is not None:
            values = reading.scale.units(logits.squeeze(-1)).tolist()
            return [Answer(f"{reading.target} {value:,.6g}", {reading.target: _rounded(value)}) for value in values]
        return [self._of_classes(row) for row in logits.softmax(-1).tolist()]

    def _of_classes(self, chances: Sequence[float]) -> Answer:
        ranked = sorted(zip(self._preprocessor.labels, chances, strict=True), key=lambda pair: -pair[1])[: self._top]
        (label, score), target = ranked[0], self._preprocessor.target
        fields = {target: label, "score": _rounded(score), "scores": {name: _rounded(p) for name, p in ranked}}
        shown = [f"{target} {name}  {chance:.4f}" for name, chance in ranked[: self._top or 1]]
        return Answer("\n".join(shown), fields)


class NextItemAnswers:
    """A saved network of histories as `toolkit predict` asks it: items in the order of time in, likely next ones out.

    Args:
        saved: from `find_model`.
        device: as for `TableAnswers`.
        top: how many items are named (default 10).
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", top: int = 10) -> None:
        self._catalogue = Catalogue.from_pretrained(saved.folder)
        if top > len(self._catalogue.items):
            raise ConfigError(f"--top {top}: there are {len(self._catalogue.items)} items", "Ask for fewer.")
        self._numbers = {item: number for number, item in enumerate(self._catalogue.items, start=1)}
        self._top = top
        place = choose_device(device)
        self._model = load_network(saved.folder).to(place).eval()

    def stream(self, inputs: Iterable[Row], *, batch: int) -> Iterator[list[Answer]]:
        """The likeliest next items of each history."""
        rest, begin = iter(inputs), 1
        while window := list(islice(rest, batch)):
            yield self._answer([self._history(row, begin + at) for at, row in enumerate(window)])
            begin += len(window)

    def _history(self, row: Row, number: int) -> list[int]:
        """The numbers of its items, which a cell of a table holds as JSON."""
        items = row.get("items")
        try:
            items = json.loads(items) if isinstance(items, str) else items
            names = [word(item) or "" for item in items] if isinstance(items, list) else []
        except (ValueError, TypeError):
            names = []
        if not names:
            raise DataError(f"row {number} has no list of items under 'items'", 'Write {"items": ["…", "…"]}.')
        if unknown := [name for name in names if name not in self._numbers]:
            raise DataError(
                f"row {number}: there is no item {unknown[0]!r:.60}.{nearest(unknown[0], self._numbers)}",
                "The model knows the items that its run had; items.json beside it lists them. Leave others out.",
            )
        return [self._numbers[name] for name in names]

    @torch.inference_mode()
    def _answer(self, histories: Sequence[list[int]]) -> list[Answer]:
        longest, device = self._model.config.n_positions, self._model.device
        newest = [history[-longest:] for history in histories]
        lengths = torch.tensor([len(history) for history in newest], device=device)
        ids = torch.zeros(len(newest), int(lengths.max()), dtype=torch.long)
        for row, history in enumerate(newest):
            ids[row, : len(history)] = torch.tensor(history)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        logits = self._model(input_ids=ids.to(device), attention_mask=mask, last=lengths - 1).logits.float()
        chances = _finite(logits).softmax(-1).cpu()
        chances[:, 0] = 0  # padding
        if self._catalogue.exclude_seen:
            for row, history in enumerate(histories):
                chances[row, history] = 0
        best = chances.topk(self._top)
        return [self._of_items(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def _of_items(self, numbers: Sequence[int], chances: Sequence[float]) -> Answer:
        found = [
            {"item": self._catalogue.items[n - 1], "title": self._catalogue.titles[n - 1], "score": _rounded(chance)}
            for n, chance in zip(numbers, chances, strict=True)
        ]
        shown = "\n".join(
            f"{one['score']:.4f}  {one['title']}" + (f"  ({one['item']})" if one["title"] != one["item"] else "")
            for one in found
        )
        return Answer(shown, {"items": found})


def _column(rows: Sequence[Row], name: str, begin: int) -> list[str | None]:
    """A column of the rows as words; each must have it, if only as null."""
    found = []
    for number, row in enumerate(rows, start=begin):
        if name not in row:
            raise DataError(
                f"row {number} has no '{name}'.{nearest(name, row)}", "Write null for a value that is not known."
            )
        try:
            found.append(word(row[name]))
        except TypeError as error:
            raise DataError(f"row {number}: '{name}': {error}", "Write one word or number.") from error
    return found


def _finite(logits: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise NumericsError(
            "the model's answer is not finite", "Its weights are damaged, or its training diverged: see its report."
        )
    return logits


def _rounded(value: float) -> float:
    """Six digits: as many as fp32 is good for."""
    return float(f"{value:.6g}")
