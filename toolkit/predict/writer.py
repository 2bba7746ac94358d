"""A saved language model that goes on with texts. Imports torch and transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import transformers

from toolkit.data import answer_end, question
from toolkit.data.text_pairs import source_tokens
from toolkit.errors import ConfigError
from toolkit.generation import beginning
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, load_saved
from toolkit.predict.saved import SavedModel

_FALLBACK_LENGTH = 512


@dataclass(frozen=True)
class Written:
    """What a model went on with, or answered.

    Attributes:
        text: as it was given.
        continuation: what follows it, or the answer, without special tokens.
    """

    text: str
    continuation: str


class Writer:
    """A saved language model, ready to write in fp32.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        plain: go on with texts, though the tokenizer has a chat template; else they are then a user's messages.

    Attributes:
        answers: whether texts are a user's messages.

    Raises:
        ConfigError: there is no such device, or no template that `plain` could pass over.
        ModelError: the files are damaged, or hold no language model.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", plain: bool = False) -> None:
        place = choose_device(device)
        self._model, self._tokenizer = load_saved(saved.folder, transformers.AutoModelForCausalLM)
        chat = bool(getattr(self._tokenizer, "chat_template", None))
        if plain and not chat:
            raise ConfigError("--plain has no effect on a model without a chat template", "Drop it.")
        self.answers = chat and not plain
        self._encode: Callable[[str, Any], list[int]] = question if self.answers else beginning
        asked = saved.data.get("instruction")
        if self.answers and asked is not None:  # a chat model that was taught to do one thing with each text
            self._encode = partial(source_tokens, room=saved.max_length or _FALLBACK_LENGTH, asked=asked)
        self._ends = {self._tokenizer.eos_token_id, *([answer_end(self._tokenizer)] if self.answers else [])}
        self._model.to(place).eval()

    def stream(
        self, texts: Iterable[str], *, batch: int = 8, tokens: int = 100, temperature: float = 0.7, seed: int = 0
    ) -> Iterator[list[Written]]:
        """What follows each text, a batch at a time.

        Args:
            texts: any number.
            batch: texts of one forward pass.
            tokens: added to each, at most.
            temperature: of the distribution that tokens are drawn from; 0 takes the likeliest each time.
            seed: of what is drawn.

        Raises:
            ConfigError: a text leaves no room for so many tokens.
        """
        torch.manual_seed(seed)
        rest = iter(texts)
        while window := list(islice(rest, batch)):
            yield self._write(window, tokens, temperature)

    def _write(self, texts: Sequence[str], tokens: int, temperature: float) -> list[Written]:
        tokenizer = self._tokenizer
        end = tokenizer.eos_token_id
        rows = [self._encode(text, tokenizer) for text in texts]
        longest = max(map(len, rows))
        positions = getattr(self._model.config, "max_position_embeddings", None)
        room = positions - getattr(self._model, "virtual_tokens", 0) if positions else longest + tokens
        if longest + tokens > room:
            raise ConfigError(
                f"a text of {longest} tokens and {tokens} more are beyond the {room} that the model was made for",
                f"Use --tokens {room - longest} at most." if longest < room else "Shorten the text.",
            )
        ids = torch.tensor([[end] * (longest - len(row)) + row for row in rows], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._model.device)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                pad_token_id=end,
                eos_token_id=[*self._ends],
                **drawn,
            )
        added = tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        return [Written(text, continuation) for text, continuation in zip(texts, added, strict=True)]


class WriterAnswers:
    """A saved language model as `toolkit predict` asks it.

    Args:
        saved: from `find_model`.
        device: as for `Writer`.
        tokens: that it adds to a text, at most (default 100).
        temperature: of what it draws; 0 takes the likeliest (default 0.7).
        plain: let a chat model go on with the text, instead of answering it.
    """

    def __init__(
        self,
        saved: SavedModel,
        *,
        device: str = "auto",
        tokens: int = 100,
        temperature: float = 0.7,
        plain: bool = False,
    ) -> None:
        self._writer = Writer(saved, device=device, plain=plain)
        self._options: dict[str, Any] = {"tokens": tokens, "temperature": temperature}
        self._name, self._between = ("answer", "\n") if self._writer.answers else ("continuation", "")

    def stream(self, inputs: Iterable[str], *, batch: int) -> Iterator[list[Answer]]:
        """What the model writes behind each text."""
        for window in self._writer.stream(inputs, batch=batch, **self._options):
            yield [
                Answer(
                    found.text + self._between + found.continuation,
                    {"text": found.text, self._name: found.continuation},
                )
                for found in window
            ]
