"""A saved encoder that gives the vectors of texts. Imports torch and transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import transformers

from toolkit.data.tokenize import encode
from toolkit.encoders import drop_pooler
from toolkit.errors import DataError, ModelError
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, loading
from toolkit.predict.saved import SavedModel
from toolkit.tasks.contrast import embed

_SHOWN = 6
"""Numbers of a vector that the screen shows."""
_DIGITS = 7


class EncoderAnswers:
    """A saved encoder as `toolkit predict` asks it: the vector of each text, and how near it is to the first.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens to which a text is cut; by default as in the run, else what the model takes.

    Raises:
        ConfigError: there is no such device.
        ModelError: the files are damaged, or the model's configuration does not say how a vector is made.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", max_length: int | None = None) -> None:
        place = choose_device(device)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with loading(saved.folder):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(saved.folder, **options)
            model: Any = transformers.AutoModel.from_pretrained(  # which may lack its pooler, as nothing reads that
                saved.folder, dtype=torch.float32, use_safetensors=True, **options
            )
        self._pooling: Any = getattr(model.config, "pooling", None)
        if self._pooling not in ("mean", "cls"):
            raise ModelError(
                f"{saved.folder}/config.json does not say how the vector of a text is made of those of its tokens",
                'Write "pooling": "mean" (or "cls") into it, as its model was trained.',
            )
        self._max_length = max_length or saved.max_length or min(self._tokenizer.model_max_length, 512)
        self._model = drop_pooler(model).to(place).eval()

    def stream(self, inputs: Iterable[str], *, batch: int) -> Iterator[list[Answer]]:
        """Vectors of length 1, and their cosines with that of the first text."""
        rest, first = iter(inputs), None
        while window := list(islice(rest, batch)):
            vectors = self._vectors(window)
            first = vectors[0] if first is None else first
            near = (vectors @ first).tolist()
            yield [
                _answer(text, vector, similarity)
                for text, vector, similarity in zip(window, vectors.tolist(), near, strict=True)
            ]

    def _vectors(self, texts: Sequence[str]) -> torch.Tensor:
        rows: list[list[int]] = encode(texts, self._tokenizer, self._max_length)["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise DataError(f"the model's tokenizer finds no token in the text {text[:40]!r}", "Leave it out.")
        inputs = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
        given = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = self._model(**given).last_hidden_state
            return embed(states, given["attention_mask"], self._pooling).cpu()


def _answer(text: str, vector: Sequence[float], similarity: float) -> Answer:
    numbers = " ".join(f"{value:+.4f}" for value in vector[:_SHOWN])
    shown = f"{text}\n{similarity:.4f} to the first; {len(vector)} numbers: {numbers} … (all with --json)"
    values = [round(value, _DIGITS) for value in vector]
    return Answer(shown, {"text": text, "similarity": round(similarity, _DIGITS), "vector": values})
