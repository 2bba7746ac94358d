"""A saved model that answers. Imports torch, transformers and datasets, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from transformers import AutoModelForSequenceClassification

from toolkit.data.tokenize import encode, encode_pairs
from toolkit.errors import ConfigError, DataError, ModelError
from toolkit.predict.encoders import Encoder
from toolkit.predict.prediction import Prediction
from toolkit.predict.saved import SavedModel

BATCHES_OF_A_WINDOW = 16
"""Texts are sorted by length within a window and written window by window; the first ones are smaller."""
_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "multi_label_classification": torch.sigmoid,
    "regression": torch.Tensor.float,
}
"""What is made of the outputs, by the `problem_type` of a model; by default probabilities of classes."""
Text = str | tuple[str, str]
"""A text, or a pair of them."""


class Classifier:
    """A saved model, ready to answer in fp32.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens to which a text is cut; by default as in the run.

    Attributes:
        labels: names of the classes, by index.
        max_length: tokens to which a text is cut, special tokens included.
        problem: `problem_type` of the model; empty for one class of a text.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no classifier.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        self._encoder = Encoder(saved, AutoModelForSequenceClassification, device=device, max_length=max_length)
        self.max_length: int = self._encoder.max_length
        config = self._encoder.config
        self.problem: str = config.problem_type if config.problem_type in _SCORES else ""
        self._score = _SCORES.get(self.problem, _shares)
        self.labels: tuple[str, ...] = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        least = 1 if self.problem else 2
        if len(set(self.labels)) < max(least, len(self.labels)):
            raise ModelError(f"{saved.folder}: its labels are {', '.join(self.labels)}; it takes two, and no two alike")

    def check_top(self, top: int | None) -> None:
        """Raises ConfigError where there are fewer labels."""
        if (top or 1) > len(self.labels):
            raise ConfigError(f"--top {top}: the model has {len(self.labels)} labels", "Ask for fewer.")

    def stream(
        self, texts: Iterable[Text], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> Iterator[list[Prediction]]:
        """`predict` over any number of texts, of which only a window is in memory at a time.

        The sizes of the windows depend on nothing but `batch`: the same texts are always padded alike.
        """
        rest, batches = iter(texts), 1
        while window := list(islice(rest, batches * batch)):
            yield self.predict(window, batch=batch, on_batch=on_batch)
            batches = min(2 * batches, BATCHES_OF_A_WINDOW)

    def predict(
        self, texts: Sequence[Text], *, batch: int = 32, on_batch: Callable[[int], None] = lambda texts: None
    ) -> list[Prediction]:
        """The predictions for `texts`, in their order.

        Args:
            texts: none of them empty; all of them pairs, or none.
            batch: texts of one forward pass; those of similar length go together.
            on_batch: called after each forward pass with the number of its texts.

        Raises:
            DataError: the tokenizer finds no token in a text.
            ConfigError: the batch does not fit into the device's memory.
            NumericsError: the model's answer is not finite.
        """
        columns = self._tokenize(texts)
        rows = columns["input_ids"]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = {name: [values[i] for i in chosen] for name, values in columns.items()}
            scores = self._encoder.ask(inputs, lambda outputs: self._score(outputs.logits.float())).tolist()
            for index, row in zip(chosen, scores, strict=True):
                ranked = sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1])
                text = texts[index]
                first, second = (text, None) if isinstance(text, str) else text
                found[index] = Prediction(first, dict(ranked), second)
            on_batch(len(chosen))
        return [found[index] for index in range(len(texts))]

    def _tokenize(self, texts: Sequence[Text]) -> dict[str, list[list[int]]]:
        pairs = [text for text in texts if not isinstance(text, str)]
        if pairs:
            found = encode_pairs(pairs, self._encoder.tokenizer, self.max_length)
            return {name: found[name] for name in ("input_ids", "token_type_ids") if name in found}
        rows: list[list[int]] = encode([str(text) for text in texts], self._encoder.tokenizer, self.max_length)[
            "input_ids"
        ]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise DataError(f"the model's tokenizer finds no token in the text {text[:40]!r}", "Leave it out.")
        return {"input_ids": rows}


def _shares(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)
