"""Attention within each text of a row of tokens, in the form that transformers' attention interface asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from toolkit.compute.dropout import keep_mask, kept_scale
from toolkit.compute.texts import Group, Texts

PLAIN = 512
"""Longest text whose attention weights are kept for the backward pass on a CPU, where there is no dropout: for longer
ones torch's fused kernel, which computes them again, is faster and needs less memory."""


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
    """Attention within each text of a row.

    Args:
        module: of attention, in a block of a model without padding.
        query, key, value: (1, heads, row, size); fewer heads in key and value where queries share them.
        attention_mask: not read; the texts are known.
        scaling: of the products; by default 1 / sqrt(size).
        dropout: share of the weights that is dropped.
        is_causal: whether tokens attend to none behind them; by default what the module says.
        sliding_window: attend to tokens that are less than so many away.

    Returns:
        (1, row, heads, size), and no weights.
    """
    texts: Texts = module.padding_free.texts
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may have made them wider
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    sizes = [group.slots for group in texts.groups]
    slots = [torch.split(texts.spread(row), sizes) for row in rows]
    plain = query.device.type == "cpu" and (dropout or texts.groups[-1].longest <= PLAIN)
    parts = []
    for group, *members in zip(texts.groups, *slots, strict=True):
        if plain:
            bias = group.bias(causal, sliding_window, value.dtype)
            parts.append(_plain(group, members, bias, scaling, dropout))
        elif causal and (sliding_window is None or sliding_window >= group.longest):
            # What is behind a text's tokens, they do not look at; and of half of the pairs nothing is computed.
            parts.append(_fused(group, members, scale=scaling, dropout_p=dropout, is_causal=True))
        else:
            bias = group.bias(causal, sliding_window, value.dtype)
            parts.append(_fused(group, members, scale=scaling, dropout_p=dropout, attn_mask=bias))
    return texts.join(torch.cat(parts)).unsqueeze(0), None


def _fused(group: Group, members: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """By torch's own kernel. Each (slots, heads, size)."""
    query, key, value = (part.view(group.texts, group.longest, *part.shape[1:]).transpose(1, 2) for part in members)
    shared = key.shape[1] != query.shape[1]
    found = scaled_dot_product_attention(query, key, value, enable_gqa=shared, **options)
    return found.transpose(1, 2).flatten(0, 1)


def _plain(
    group: Group, members: list[torch.Tensor], bias: torch.Tensor | None, scaling: float, dropout: float
) -> torch.Tensor:
    """By batched matrix products, which on a CPU are several times as fast. Each (slots, heads, size)."""
    heads = members[1].shape[1]
    query, key, value = (_by_head(part, group, heads) for part in members)
    found = _Plain.apply(query, key, value, bias, scaling, dropout)  # type: ignore[no-untyped-call]
    return _by_slot(found, group, members[0].shape[1])


def _by_head(slots: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """(slots, heads × shared, size) to (texts × heads, shared × longest, size)."""
    found = slots.view(group.texts, group.longest, *slots.shape[1:]).transpose(1, 2)
    return found.reshape(group.texts * heads, -1, slots.shape[2])


def _by_slot(found: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """The way back; `heads` of the queries."""
    return found.view(group.texts, heads, group.longest, -1).transpose(1, 2).reshape(group.slots, heads, -1)


class _Plain(torch.autograd.Function):
    """softmax(scaling · query · keyᵀ + bias), with dropout, times value; its gradient as in Dao et al. 2022, B.2.

    query (batch, shared × length, size), key and value (batch, length, size), batch = texts × heads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        scores = _product(query, key.transpose(1, 2), scaling)
        if bias is not None:
            length = key.shape[1]
            texts = bias.shape[0] if bias.shape[0] > 1 else 1
            scores.view(texts, -1, length, length).add_(bias)
        weights = scores.softmax(-1)
        kept = weights * keep_mask(weights.shape, dropout, weights.dtype) if dropout else weights
        ctx.scaling, ctx.scale = scaling, kept_scale(dropout)
        ctx.save_for_backward(query, key, value, weights, kept)
        return _product(kept, value, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, weights, kept = ctx.saved_tensors
        of_value = _product(kept.transpose(1, 2), gradient, ctx.scale)
        inner = _product(gradient, value.transpose(1, 2), ctx.scale).mul_(kept)
        of_scores = inner.addcmul_(weights, inner.sum(-1, keepdim=True), value=-1)
        of_query = _product(of_scores, key, ctx.scaling)
        of_key = _product(of_scores.transpose(1, 2), query, ctx.scaling)
        return of_query, of_key, of_value, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled before it is rounded."""
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=scale)
