"""A saved model that marks names in texts. Imports torch, transformers and datasets, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from transformers import AutoModelForTokenClassification

from toolkit.data.entities import entities, tokens_in
from toolkit.data.token_tags import frame, pieces, sub_words
from toolkit.errors import ModelError
from toolkit.predict.encoders import Encoder
from toolkit.predict.kinds import Answer
from toolkit.predict.saved import SavedModel

_STOPS = frozenset(".!?;。！？；")
_Piece = tuple[int, int, int, list[list[int]]]
"""Number of the text, its first word and the one behind its last, and the sub-words of each."""


class Tagger:
    """A saved tagger, ready to answer in fp32.

    A text of more tokens than the model reads at once is read in pieces, which begin behind a sentence where they can.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens of a piece; by default as in the run.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no tagger of names.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        self._encoder = Encoder(saved, AutoModelForTokenClassification, device=device, max_length=max_length)
        labels = self._encoder.config.id2label
        self._labels = [str(labels[index]) for index in range(len(labels))]
        self._before, self._after = frame(self._encoder.tokenizer)
        self._room = self._encoder.max_length - len(self._before) - len(self._after)
        if "O" not in self._labels:
            raise ModelError(f"{saved.folder}: none of its tags is O, so that they mark no names", "Train another.")

    def stream(self, inputs: Iterable[str], *, batch: int) -> Iterator[list[Answer]]:
        """The names in each text."""
        rest = iter(inputs)
        while window := list(islice(rest, batch)):
            yield self._mark(window, batch)

    def _mark(self, texts: Sequence[str], batch: int) -> list[Answer]:
        places = [tokens_in(text) for text in texts]
        rows: list[_Piece] = []
        for number, (text, spans) in enumerate(zip(texts, places, strict=True)):
            words = [text[begin:end] for begin, end in spans]
            blanks = [begin > 0 and text[begin - 1].isspace() for begin, _ in spans]
            ids = sub_words(words, blanks, self._encoder.tokenizer) if words else []
            stops = [at == 0 or words[at - 1] in _STOPS for at in range(len(words))]
            for begin, end in pieces(list(map(len, ids)), self._room, stops):
                rows.append((number, begin, end, ids[begin:end]))
        tags: list[list[str]] = [["O"] * len(spans) for spans in places]
        sure: list[list[float]] = [[1.0] * len(spans) for spans in places]
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            for (number, begin, end, _), found in zip(chosen, self._tagged(chosen), strict=True):
                tags[number][begin:end] = [self._labels[label] for label, _ in found]
                sure[number][begin:end] = [share for _, share in found]
        return [_answer(*one) for one in zip(texts, places, tags, sure, strict=True)]

    def _tagged(self, rows: Sequence[_Piece]) -> Iterator[list[tuple[int, float]]]:
        """Label and probability of each word of the pieces."""
        flat = [[token for word in ids for token in word][: self._room] for *_, ids in rows]
        inputs = {"input_ids": [[*self._before, *tokens, *self._after] for tokens in flat]}
        scores = self._encoder.ask(inputs, lambda outputs: outputs.logits.float().softmax(-1))
        padding_left = self._encoder.tokenizer.padding_side == "left"
        for (*_, ids), row, given in zip(rows, scores, inputs["input_ids"], strict=True):
            at = len(self._before) + (len(row) - len(given) if padding_left else 0)
            found = []
            for word in ids:
                share, label = row[at].max(-1)
                found.append((int(label), float(share)))
                at += len(word)
            yield found


def _answer(text: str, places: Sequence[tuple[int, int]], tags: Sequence[str], sure: Sequence[float]) -> Answer:
    names: list[dict[str, Any]] = []
    shown, done = "", 0
    for first, behind, kind in entities(tags):
        begin, end = places[first][0], places[behind - 1][1]
        score = sum(sure[first:behind]) / (behind - first)
        names.append({"start": begin, "end": end, "text": text[begin:end], "label": kind, "score": round(score, 4)})
        shown, done = f"{shown}{text[done:begin]}[{text[begin:end]} {kind}]", end
    return Answer(shown + text[done:], {"text": text, "entities": names})
