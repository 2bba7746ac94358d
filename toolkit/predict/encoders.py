"""What all saved encoders have in common: how they are loaded, checked, and asked. Imports torch and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toolkit.compute import remove_padding
from toolkit.errors import ConfigError, ModelError, NumericsError
from toolkit.predict.loading import choose_device, load_saved
from toolkit.predict.saved import SavedModel

_FALLBACK_LENGTH = 512


class Encoder:
    """A saved encoder with its head, ready to answer in fp32.

    Args:
        saved: from `find_model`.
        head: class of transformers that loads it.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        max_length: tokens of a forward pass; by default as in the run.

    Attributes:
        tokenizer: of its texts.
        config: of the network.
        max_length: tokens of a forward pass, special ones included.

    Raises:
        ConfigError: there is no such device, or the length is out of the model's range.
        ModelError: the files are damaged, or hold no such model.
    """

    def __init__(self, saved: SavedModel, head: Any, *, device: str = "auto", max_length: int | None = None) -> None:
        self._device = choose_device(device)
        model, self.tokenizer = load_saved(saved.folder, head)
        if self.tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer in {saved.folder} has no padding token", "Save one that has.")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id  # by which a decoder finds the end of a text
        remove_padding(model)
        self._model = model.to(self._device).eval()
        self.config = model.config
        longest = _longest(self.tokenizer, model)
        shortest = self.tokenizer.num_special_tokens_to_add(pair=False) + 1
        if max_length is not None and not shortest <= max_length <= longest:
            raise ConfigError(
                f"--max-length {max_length}: this model takes {shortest} to {longest} tokens", "Choose among these."
            )
        self.max_length: int = max_length or saved.max_length or longest

    def ask(self, rows: Mapping[str, Sequence[list[int]]], read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """What `read` makes of the model's outputs for some rows of tokens, padded, on the CPU.

        Raises:
            ConfigError: they do not fit into the device's memory.
            NumericsError: the answer is not finite.
        """
        # The mask, and token type ids only of pairs: what training gives the model.
        inputs = self.tokenizer.pad({name: list(values) for name, values in rows.items()}, return_tensors="pt")
        try:
            with torch.inference_mode():
                tensors = {name: inputs[name].to(self._device) for name in (*rows, "attention_mask")}
                answer = read(self._model(**tensors))
        except torch.OutOfMemoryError as error:
            ids = rows["input_ids"]
            raise ConfigError(
                f"{len(ids)} texts of up to {max(map(len, ids))} tokens do not fit into the GPU's memory",
                "Use a smaller --batch.",
            ) from error
        if not torch.isfinite(answer).all():
            raise NumericsError(
                "the model's answer is not finite", "Its weights are damaged, or its training diverged: see its report."
            )
        return answer.cpu()


def _longest(tokenizer: Any, model: Any) -> int:
    """The most tokens that the model takes, as far as it says so."""
    positions = getattr(model.config, "max_position_embeddings", None) or _FALLBACK_LENGTH
    return int(min(positions, tokenizer.model_max_length or positions)) - getattr(model, "virtual_tokens", 0)
