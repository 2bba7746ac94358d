"""A saved encoder–decoder that writes a text for each: a translation, a summary. Imports torch and transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import transformers

from toolkit.compute import remove_padding
from toolkit.data.text_pairs import source_tokens
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, load_saved
from toolkit.predict.saved import SavedModel
from toolkit.tasks.seq2seq import padded

_FALLBACK_LENGTH = 512


class Translator:
    """A saved encoder–decoder, ready to write in fp32, with as many beams as it was tested with.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        tokens: that it writes for a text, at most; by default as in the run.
        max_length: tokens to which a text is cut; by default as in the run.

    Raises:
        ConfigError: there is no such device.
        ModelError: the files are damaged, or hold no encoder–decoder.
    """

    def __init__(
        self, saved: SavedModel, *, device: str = "auto", tokens: int | None = None, max_length: int | None = None
    ) -> None:
        place = choose_device(device)
        model, self._tokenizer = load_saved(saved.folder, transformers.AutoModelForSeq2SeqLM)
        remove_padding(model)
        self._model = model.to(place).eval()
        self._options = {} if tokens is None else {"max_new_tokens": tokens}
        self._room = max_length or saved.max_length or _FALLBACK_LENGTH
        self._prefix = str(saved.data.get("prefix", ""))

    def stream(self, inputs: Iterable[str], *, batch: int) -> Iterator[list[Answer]]:
        """What the model writes for each text."""
        rest = iter(inputs)
        while window := list(islice(rest, batch)):
            yield [
                Answer(f"{text}\n{written}", {"text": text, "written": written})
                for text, written in zip(window, self._write(window), strict=True)
            ]

    def _write(self, texts: list[str]) -> list[str]:
        tokenizer = self._tokenizer
        rows = [source_tokens(text, tokenizer, self._room, prefix=self._prefix) for text in texts]
        ids, there = padded(rows, tokenizer.pad_token_id)
        inputs = {"input_ids": ids.to(self._model.device), "attention_mask": there.long().to(self._model.device)}
        with torch.inference_mode():
            found = self._model.generate(**inputs, **self._options)
        return [text.strip() for text in tokenizer.batch_decode(found.tolist(), skip_special_tokens=True)]
