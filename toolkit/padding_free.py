"""Padding-free forward and backward: texts of any lengths, without a computation on padding.

A batch comes padded, (texts, length), and so are its embeddings. From the first block of the network to the last only
the real tokens are there, end to end as one row (1, tokens, features), and attention is computed within each text.
After the last block the row is padded again, so heads, losses and metrics see what they know. Models of the hub are
served as they are: by hooks on their blocks, and by an attention function for transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from toolkit.models import repeated_blocks

IMPLEMENTATION = "toolkit_padding_free"
GROUP = 8
"""Texts of similar length whose attention is computed at once."""
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
        texts: how those of the last forward lie; None where they had no attention mask.
    """

    def __init__(self, model: Any) -> None:
        self.texts: Texts | None = None
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
        self.texts = None if mask is None else Texts(mask.bool())

    def _pack(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states before the first block, and before each what is given for each token."""
        if self.texts is None:
            return None
        kwargs = kwargs | {name: self._of_tokens(kwargs[name]) for name in TOKENWISE if name in kwargs}
        if args[0].shape[:2] == self.texts.shape:
            args = (self.texts.pack(args[0]), *args[1:])
        return args, kwargs

    def _of_tokens(self, value: Any) -> Any:
        assert self.texts is not None
        if isinstance(value, tuple):
            return tuple(map(self._of_tokens, value))
        return None if value is None else self.texts.pack(value)

    def _unpack(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.texts is None:
            return None
        if isinstance(output, tuple):
            return (self.texts.unpack(output[0]), *output[1:])
        return self.texts.unpack(output)


class Texts:
    """How the texts of one micro-batch lie in a row of tokens: sorted by length, end to end.

    Args:
        mask: (texts, length), true where there is a token.

    Attributes:
        shape: of the mask.
        groups: neighbours in the row, for attention.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.shape = mask.shape
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        found = mask[order].flatten().nonzero().squeeze(1)
        # Where each token of the row lies in the flattened batch.
        self._places = order[found // mask.shape[1]] * mask.shape[1] + found % mask.shape[1]
        self.groups = list(_groups(lengths[order].tolist(), mask.device))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """(texts or 1, length, …) to (1, tokens, …)."""
        whole = padded.expand(self.shape[0], *padded.shape[1:])
        return whole.flatten(0, 1).index_select(0, self._places).unsqueeze(0)

    def unpack(self, row: torch.Tensor) -> torch.Tensor:
        """(1, tokens, …) to (texts, length, …), with zeros for padding."""
        flat = row.new_zeros(self.shape.numel(), *row.shape[2:])
        return flat.index_copy(0, self._places, row[0]).view(*self.shape, *row.shape[2:])


class _Group:
    """Texts of similar length, from token `start` of the row to `end`; the longest comes last."""

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.end = start, start + sum(lengths)
        self.texts, self.longest = len(lengths), lengths[-1]
        self.ragged = lengths[0] != lengths[-1]
        if self.ragged:
            held = torch.tensor(lengths, device=device)[:, None] > torch.arange(self.longest, device=device)
            self.mask = held[:, None, None, :]
            self._held = held.flatten().nonzero().squeeze(1)
            self._sources = (held.flatten().cumsum(0) - 1).clamp(min=0)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, size) to (texts, heads, longest, size)."""
        if self.ragged:
            tokens = tokens.index_select(0, self._sources)
        return tokens.view(self.texts, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def join(self, spread: torch.Tensor) -> torch.Tensor:
        """What `spread` has spread, end to end again."""
        tokens = spread.transpose(1, 2).flatten(0, 1)
        return tokens.index_select(0, self._held) if self.ragged else tokens


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text of a row, in the form that transformers' attention interface asks for.

    Args:
        module: of attention, in a block of a model without padding.
        query, key, value: (1, heads, tokens, size); fewer heads in key and value where queries share them.
        sliding_window: attend to tokens that are less than so many away.

    Returns:
        (1, tokens, heads, size), and no weights.
    """
    texts: Texts | None = module.padding_free.texts
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if texts is None:  # all of the same length: a batch as it is
        mask = _near(query.shape[2], sliding_window, causal, query.device)
        options |= {"attn_mask": mask, "is_causal": causal and mask is None}
        return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    parts = [_within(group, rows, sliding_window, causal, options) for group in texts.groups]
    return torch.cat(parts).unsqueeze(0), None


def _within(
    group: _Group, rows: Sequence[torch.Tensor], window: int | None, causal: bool, options: dict[str, Any]
) -> torch.Tensor:
    query, key, value = (group.spread(row[group.start : group.end]) for row in rows)
    mask = _near(group.longest, window, causal, rows[0].device)
    if group.ragged and not causal:  # padding lies behind a text's tokens, where those of a causal model do not look
        mask = group.mask if mask is None else mask & group.mask
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, **options
    )
    return group.join(found)


def _groups(lengths: Sequence[int], device: torch.device) -> Iterator[_Group]:
    start = 0
    for first in range(0, len(lengths), GROUP):
        group = _Group(start, lengths[first : first + GROUP], device)
        yield group
        start = group.end


def _near(length: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """(1, 1, length, length), true where a token is within the window of another one; None where all are."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    return ((behind >= (0 if causal else 1 - window)) & (behind < window))[None, None]


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
