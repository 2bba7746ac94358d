"""Padding-free forward and backward: texts of any lengths, without a computation on padding.

A batch comes padded, (texts, length), and so are its embeddings. From the first block of the network to the last only
the real tokens are there, end to end as one row (1, tokens, features), and attention is computed within each text.
After the last block the row is padded again, so heads, losses and metrics see what they know. Models of the hub are
served as they are: by hooks on their blocks, and by an attention function for transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from toolkit.compute.attention import attend
from toolkit.compute.texts import Texts
from toolkit.models import repeated_blocks

IMPLEMENTATION = "toolkit_padding_free"
TOKENWISE = ("position_embeddings", "position_ids")
"""What blocks are given for each token, beside the hidden states."""
TOLERANCE = 1e-4
"""Largest difference of a logit to the padded model's, relative to the largest logit: fp32 in another order."""


def remove_padding(model: Any) -> str:
    """Let a model compute without padding, if that changes nothing else.

    Args:
        model: of transformers, in fp32 on the CPU, not yet laid over the ranks.

    Returns:
        Why the model stays as it was; empty where it now computes without padding.
    """
    if why := _obstacle(model):
        return why
    padded, free = _probe(model), _PaddingFree(model)
    try:
        difference = float((_probe(model) - padded).abs().max() / padded.abs().max().clamp(min=1e-6))
    except (RuntimeError, IndexError, KeyError) as error:  # a shape that does not fit, an argument that is missing
        difference, why = 0.0, f"it does not take a row of tokens: {error}"
    if difference > TOLERANCE:
        why = f"its outputs would differ by {difference:.1e}"
    if why:
        free.leave()
    return why


def _obstacle(model: Any) -> str:
    """Why this model cannot go without padding, as far as it can be told without running it."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return "it does not read token ids"
    if model.config.is_encoder_decoder:
        return "it has an encoder and a decoder"
    if not (model._supports_attention_backend and model._supports_sdpa):
        return "its attention cannot be replaced"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is to be {model.config._attn_implementation}"
    if len({type(block) for block in repeated_blocks(model)}) != 1:
        return "its blocks are not all alike"
    return ""


class _PaddingFree:
    """The hooks of a model that computes without padding.

    Attributes:
        texts: how those of the last forward lie.
    """

    def __init__(self, model: Any) -> None:
        self.texts: Texts
        self._model = model
        blocks = repeated_blocks(model)
        model.set_attn_implementation(IMPLEMENTATION)
        self._hooks = [
            model.register_forward_pre_hook(self._look, with_kwargs=True),
            *(block.register_forward_pre_hook(self._pack, with_kwargs=True) for block in blocks),
            blocks[-1].register_forward_hook(self._unpack),
        ]
        for block in blocks:
            for module in block.modules():
                module.padding_free = self  # type: ignore[assignment]  # where `attend` finds it

    def leave(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation("sdpa")

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.texts = Texts((torch.ones_like(kwargs["input_ids"]) if mask is None else mask).bool())

    def _pack(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states before the first block, and before each what is given for each token."""
        kwargs = kwargs | {name: self._of_tokens(kwargs[name]) for name in TOKENWISE if name in kwargs}
        if args[0].shape[:2] == self.texts.shape:
            args = (self.texts.pack(args[0]), *args[1:])
        return args, kwargs

    def _of_tokens(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._of_tokens, value))
        return None if value is None else self.texts.pack(value)

    def _unpack(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.texts.unpack(output[0]), *output[1:])
        return self.texts.unpack(output)


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """The first output on three short texts, where there are tokens."""
    lengths = torch.tensor([2, 9, 5])
    mask = torch.arange(9) < lengths[:, None]
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(27).view(3, 9) * 7919 % vocabulary).where(mask, model.config.pad_token_id or 0)
    training = model.training
    model.eval()
    output: torch.Tensor = model(input_ids=ids, attention_mask=mask.long())[0]
    model.train(training)
    return output[mask] if output.shape[:2] == mask.shape else output


AttentionInterface.register(IMPLEMENTATION, attend)
