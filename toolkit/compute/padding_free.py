"""Padding-free forward and backward: texts of any lengths, without a computation on padding.

A batch comes padded, (texts, length), and so are its embeddings. From the first block of the network to the last only
the real tokens are there, end to end as one row (1, tokens, features), and attention is computed within each text.
After the last block the row is padded again, so heads, losses and metrics see what they know. An encoder and its
decoder have a row each, and images lie in a row like texts of one length. Models of the hub are served as they are: by
hooks on their blocks, and by an attention function for transformers' attention interface.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from toolkit.compute.attention import attend
from toolkit.compute.host import on_host
from toolkit.compute.texts import Pairs, Texts
from toolkit.models import repeated_blocks

IMPLEMENTATION = "toolkit_padding_free"
TOKENWISE = ("position_embeddings", "position_ids")
"""What blocks are given for each token, beside the hidden states."""
ACROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""What models call a decoder's attention to its encoder."""
TOLERANCE = 1e-4
"""Largest difference of a logit to the padded model's, relative to the largest logit: fp32 in another order."""


def remove_padding(model: Any) -> str:
    """Let a model compute without padding, if that changes nothing else.

    While it generates text (it is given a cache of keys and values) it computes as it did before.

    Args:
        model: of transformers, in fp32 on the CPU, not yet laid over the ranks.

    Returns:
        Why the model stays as it was; empty where it now computes without padding.
    """
    if why := _obstacle(model):
        return why
    stacks: list[_Stack] = []
    try:
        padded = _probe(model)
        stacks += [_Stack(module) for module in _stacks(model)]
        model.set_attn_implementation(IMPLEMENTATION)
        difference = float((_probe(model) - padded).abs().max() / padded.abs().max().clamp(min=1e-6))
        why = f"its outputs would differ by {difference:.1e}" if difference > TOLERANCE else ""
        if not all(stack.free for stack in stacks):
            why = "its blocks are given keys and values that no token of a text has"
    except Exception as error:  # what a model raises that wants other inputs, or other shapes, is its own affair
        why = f"it does not take a row of tokens: {error}"
    if why:
        for stack in stacks:
            stack.leave()
        model.set_attn_implementation("sdpa")
    return why


def _obstacle(model: Any) -> str:
    """Why this model cannot go without padding, as far as it can be told without running it."""
    if getattr(model, "main_input_name", "") not in ("input_ids", "pixel_values"):
        return "it reads neither token ids nor images"
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is to be {model.config._attn_implementation}"
    if any(len({type(block) for block in repeated_blocks(stack)}) != 1 for stack in _stacks(model)):
        return "its blocks are not all alike"
    if any(value and re.search("layerdrop|drop_path", name) for name, value in vars(model.config).items()):
        return "it skips blocks at random"  # all of them, or for a sample: there are no samples in a row
    return ""


def _stacks(model: Any) -> list[nn.Module]:
    """Where the blocks are: in an encoder and a decoder, or in the model itself."""
    return [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]


class _Stack:
    """The hooks on an encoder, a decoder or a model that is only one of them.

    Attributes:
        free: whether the last forward computed without padding; it did not where it was given a cache.
    """

    def __init__(self, module: Any) -> None:
        self._config = module.config
        self._parameters = inspect.signature(module.forward).parameters
        self._mask: torch.Tensor | None
        self._texts: Texts | None
        self._encoded: Texts | None
        self._pairs: dict[bool, Pairs]
        blocks = repeated_blocks(module)
        hooks: list[Any] = [
            module.register_forward_pre_hook(self._look, with_kwargs=True),
            *(block.register_forward_pre_hook(self._pack, with_kwargs=True) for block in blocks),
            blocks[-1].register_forward_hook(self._unpack),
        ]
        self._undo: list[Callable[[], None]] = [hook.remove for hook in hooks]
        for block in blocks:
            for name, part in block.named_modules():
                part.padding_free = self  # where `attend` finds it
                part.across = any(word in ACROSS for word in name.split("."))
                if hasattr(part, "compute_bias"):
                    self._compute_bias_once(part)

    def leave(self) -> None:
        """Leave the module as it was."""
        for undo in self._undo:
            undo()

    def pairs(self, attention: Any) -> Pairs:
        """What the tokens of this stack attend to in such a module, in this forward."""
        across: bool = attention.across
        if across not in self._pairs:
            assert self._texts is not None
            keys = self._encoded if across else self._texts
            assert keys is not None
            self._pairs[across] = Pairs(self._texts, keys)
        return self._pairs[across]

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a forward: where are its texts?"""
        self._texts, self._encoded, self._pairs = None, None, {}
        self.free = kwargs.get("past_key_values") is None
        self._config._attn_implementation = IMPLEMENTATION if self.free else "sdpa"
        if not self.free:
            return None
        self._mask = kwargs.get("attention_mask")
        if "use_cache" in self._parameters:  # keys and values of a row are of no use to a forward that goes on from it
            kwargs = kwargs | {"use_cache": False}
        if (encoded := kwargs.get("encoder_hidden_states")) is not None:
            self._encoded = _texts(kwargs.get("encoder_attention_mask"), encoded)
            kwargs = kwargs | {"encoder_hidden_states": self._encoded.pack(encoded)}
        return args, kwargs

    def _pack(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states before the first block, and before each what is given for each token."""
        if not self.free:
            return None
        if self._texts is None:
            self._texts = _texts(self._mask, args[0])
        kwargs = kwargs | {name: self._of_tokens(kwargs[name]) for name in TOKENWISE if name in kwargs}
        if args[0].shape[:2] == self._texts.shape:
            args = (self._texts.pack(args[0]), *args[1:])
        return args, kwargs

    def _of_tokens(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._of_tokens, value))
        assert self._texts is not None
        return None if value is None else self._texts.pack(value)

    def _unpack(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._texts is None:
            return None
        if isinstance(output, tuple):
            return (self._texts.unpack(output[0]), *output[1:])
        return self._texts.unpack(output)

    def _compute_bias_once(self, attention: Any) -> None:
        """Let a bias of positions be that of the longest text, not of the row; where there is none, a single zero."""
        compute, biased = attention.compute_bias, attention.has_relative_attention_bias

        @functools.wraps(compute)
        def of_longest(rows: int, columns: int, **options: Any) -> Any:
            if not biased:
                return attention.q.weight.new_zeros(1, 1, 1, 1)
            if self._texts is not None:
                rows = columns = self.pairs(attention).longest
            return compute(rows, columns, **options)

        def leave() -> None:
            attention.has_relative_attention_bias = biased
            del attention.compute_bias

        attention.compute_bias, attention.has_relative_attention_bias = of_longest, True
        self._undo.append(leave)


def _texts(mask: torch.Tensor | None, hidden: torch.Tensor) -> Texts:
    """As the mask has them, which may bring them along as `laid`; or as many of one length as there are."""
    if mask is None:
        return Texts(torch.ones(hidden.shape[:2], dtype=torch.bool), hidden.device)
    laid: Texts | None = getattr(mask, "laid", None)
    return Texts(on_host(mask).bool(), hidden.device) if laid is None else laid


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """The first output on three short texts, where there are tokens, or on two images."""
    training = model.training
    model.eval()
    inputs = _images(model.config) if model.main_input_name == "pixel_values" else short_texts(model.config)
    output: torch.Tensor = model(**inputs)[0]
    model.train(training)
    mask = inputs.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output


def _images(config: Any) -> dict[str, torch.Tensor]:
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    shape = (2, config.num_channels, *size)
    return {"pixel_values": torch.linspace(-1, 1, 2 * config.num_channels * size[0] * size[1]).view(shape)}


def short_texts(config: Any) -> dict[str, torch.Tensor]:
    """The inputs of a model of this configuration: three texts of 2, 9 and 5 tokens, padded."""
    lengths = torch.tensor([2, 9, 5])
    mask = torch.arange(9) < lengths[:, None]
    vocabulary = config.get_text_config().vocab_size
    ids = torch.arange(27).view(3, 9) * 7919 % vocabulary
    if config.is_encoder_decoder:  # their heads look for the end of each text
        ids[ids == config.eos_token_id] = (config.eos_token_id + 1) % vocabulary
        ids[torch.arange(3), lengths - 1] = config.eos_token_id
    inputs = {"input_ids": ids.where(mask, config.pad_token_id or 0), "attention_mask": mask.long()}
    if config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    return inputs


AttentionInterface.register(IMPLEMENTATION, attend)
