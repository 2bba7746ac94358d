"""A saved classifier of texts that answers: with a class, several labels, or a number; of texts, or of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from toolkit.predict.classifier import Classifier, Text
from toolkit.predict.kinds import Answer
from toolkit.predict.prediction import Prediction
from toolkit.predict.saved import SavedModel
from toolkit.text_files import of_row

THRESHOLD = 0.5
"""Of the probability from which on a text has a label, as in the recipe's evaluation."""


class Scorer:
    """Such a model, ready to answer in fp32.

    Args:
        saved: from `find_model`. Rows of pairs have the columns of its run.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens to which a text, or a pair, is cut; by default as in the run.
        top: of classes, how many have their score told (default: all).

    Raises:
        ConfigError: there is no such device, the length is out of the model's range, or there are fewer classes.
        ModelError: the files are damaged, or hold no classifier.
    """

    def __init__(
        self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None, top: int | None = None
    ) -> None:
        self._classifier = Classifier(saved, device=device, max_length=max_length)
        self._classifier.check_top(top)
        self._top = top
        pair = saved.data.get("text_pair")
        self._columns = [str(saved.data.get("text", "text")), str(pair)] if pair else []

    def stream(self, inputs: Iterable[Any], *, batch: int) -> Iterator[list[Answer]]:
        """What it says of each text or row."""
        texts = (self._text(row, number) for number, row in enumerate(inputs, start=1))
        for window in self._classifier.stream(texts, batch=batch):
            yield [self._answer(found) for found in window]

    def _text(self, row: Any, number: int) -> Text:
        if not self._columns:
            return str(row)
        first, second = of_row(row, self._columns, number)
        return first, second

    def _answer(self, found: Prediction) -> Answer:
        scores = {label: float(f"{score:.6g}") for label, score in found.top(self._top)}
        given: dict[str, Any] = {"text": found.text}
        if self._columns:
            given = dict(zip(self._columns, (found.text, found.pair), strict=True))
        if self._classifier.problem == "regression":
            (value,) = scores.values()
            return Answer(f"{found.text}\n{value:.4f}", given | {"value": value})
        if self._classifier.problem:
            labels = [label for label, score in scores.items() if score >= THRESHOLD]
            return Answer(f"{found.text}\n{', '.join(labels) or '–'}", given | {"labels": labels, "scores": scores})
        shown = f"{found.text}\n{found.label} ({found.score:.4f})"
        return Answer(shown, given | {"label": found.label, "score": scores[found.label], "scores": scores})
