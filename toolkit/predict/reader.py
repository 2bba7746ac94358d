"""A saved model that finds answers in passages. Imports torch, transformers and datasets, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering

from toolkit.data.answer_spans import Window, windows
from toolkit.data.rows import Unfit
from toolkit.errors import DataError
from toolkit.predict.encoders import Encoder
from toolkit.predict.kinds import Answer
from toolkit.predict.saved import SavedModel
from toolkit.tasks.question_answering import best_spans
from toolkit.text_files import of_row

_STRIDE, _LONGEST = 64, 30


class Reader:
    """A saved reader, ready to answer in fp32: the likeliest stretch of a passage, over as many windows as it takes.

    Args:
        saved: from `find_model`. The rows have the columns of its run, by default `question` and `passage`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens of a window; by default as in the run.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no reader.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        self._encoder = Encoder(saved, AutoModelForQuestionAnswering, device=device, max_length=max_length)
        self._encoder.tokenizer.padding_side = "right"
        self._columns = [str(saved.data.get(key, key)) for key in ("question", "passage")]
        room = self._encoder.max_length // 2 - self._encoder.tokenizer.num_special_tokens_to_add(pair=True)
        self._stride = min(int(saved.data.get("stride", _STRIDE)), room - 1)
        self._longest = int(saved.data.get("answer_tokens", _LONGEST))

    def stream(self, inputs: Iterable[Mapping[str, Any]], *, batch: int) -> Iterator[list[Answer]]:
        """The answer to each row's question."""
        rest = enumerate(inputs, start=1)
        while some := list(islice(rest, batch)):
            yield [self._read(of_row(row, self._columns, number), number, batch) for number, row in some]

    def _read(self, texts: Sequence[str], number: int, batch: int) -> Answer:
        question, passage = texts
        try:
            found = windows(
                question, passage, self._encoder.tokenizer, length=self._encoder.max_length, stride=self._stride
            )
        except Unfit as reason:
            raise DataError(f"row {number} cannot be read: {reason}", "Shorten it, or raise --max-length.") from None
        score, begin, end = max(
            place for at in range(0, len(found), batch) for place in self._spans(found[at : at + batch])
        )
        answer = passage[begin:end]
        fields = {"question": question, "answer": answer, "start": begin, "end": end, "score": round(score, 3)}
        return Answer(f"{question}\n{answer}", fields)

    def _spans(self, some: Sequence[Window]) -> Iterator[tuple[float, int, int]]:
        """Of each window the sum of the logits of its best stretch, and where that is in the passage."""
        inputs = {"input_ids": [window.input_ids for window in some]}
        if "token_type_ids" in self._encoder.tokenizer.model_input_names:
            inputs["token_type_ids"] = [window.segments for window in some]
        logits = self._encoder.ask(inputs, lambda out: torch.stack([out.start_logits, out.end_logits], 1).float())
        allowed = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.bool)
        for row, window in enumerate(some):
            allowed[row, : len(window.begins)] = torch.tensor(window.begins) >= 0
        scores, first, last = best_spans(logits[:, 0], logits[:, 1], allowed, self._longest)
        for window, score, begin, end in zip(some, scores, first, last, strict=True):
            yield score, window.begins[begin], window.ends[end]
