"""Attention within each text of a row of tokens, in the form that transformers' attention interface asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from toolkit.compute.dropout import keep_mask, kept_scale
from toolkit.compute.texts import Group, Pairs

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
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text of a row.

    Args:
        module: of attention, in a block of a model without padding.
        query, key, value: (1, heads, row, size); fewer heads in key and value where queries share them. The row of
            key and value is another one where a decoder attends to its encoder.
        attention_mask: not read; the texts are known.
        scaling: of the products; by default 1 / sqrt(size).
        dropout: share of the weights that is dropped.
        is_causal: whether tokens attend to none behind them; by default what the module says.
        sliding_window: attend to tokens that are less than so many away.
        position_bias: (1, heads or 1, rows, columns) to be added to the products, for texts of any length up to that.

    Returns:
        (1, row, heads, size), and no weights.
    """
    pairs: Pairs = module.padding_free.pairs(module)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may have made them wider
    if _ragged(query, position_bias):
        found = _by_bounds(pairs, query, key, value, causal, sliding_window, scaling, dropout)
        return found.unsqueeze(0), None
    slots = [
        torch.split(room.spread(tensor[0].transpose(0, 1)), room.sizes)
        for tensor, room in ((query, pairs.queries), (key, pairs.keys), (value, pairs.keys))
    ]
    plain = query.device.type == "cpu" and (dropout or pairs.longest <= PLAIN)
    parts = []
    for group, *members in zip(pairs.groups, *slots, strict=True):
        position = None if position_bias is None else position_bias[:, :, : group.rows, : group.columns]
        # torch's kernel leaves out the half of the pairs that a causal model does not look at.
        halved = causal and not plain and position is None and (sliding_window or group.columns) >= group.columns
        bias = None if halved else group.bias(causal, sliding_window, value.dtype)
        if plain:
            parts.append(_plain(group, members, bias, position, scaling, dropout))
        else:
            bias = position if bias is None else bias if position is None else bias + position
            parts.append(_fused(group, members, bias, scale=scaling, dropout_p=dropout, is_causal=halved))
    return pairs.queries.join(torch.cat(parts)).unsqueeze(0), None


def _ragged(query: torch.Tensor, position_bias: torch.Tensor | None) -> bool:
    """Whether there is a kernel that takes texts of any lengths as they lie in the row."""
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and position_bias is None and size <= 256 and size % 8 == 0


def _by_bounds(
    pairs: Pairs,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    window: int | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """By torch's FlashAttention (Dao 2023), which is given where texts end: (row, heads, size)."""
    # Not by `torch.nn.attention.varlen`, which has no dropout. The filler is a text of its own, so that what it shows
    # is a number.
    rows, columns = pairs.of_queries, pairs.of_keys
    reach = None if window is None else window - 1
    found: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        rows.bounds,
        columns.bounds,
        rows.longest,
        columns.longest,
        dropout,
        causal,
        False,
        scale=scaling,
        window_size_left=reach,
        window_size_right=0 if causal else reach,
    )[0]
    return found


def _fused(group: Group, members: list[torch.Tensor], bias: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """By torch's own kernel. Each (slots, heads, size)."""
    query, key, value = (part.view(group.texts, -1, *part.shape[1:]).transpose(1, 2) for part in members)
    shared = key.shape[1] != query.shape[1]
    mask = None if bias is None else bias.to(query.dtype)
    found = scaled_dot_product_attention(query, key, value, mask, enable_gqa=shared, **options)
    return found.transpose(1, 2).flatten(0, 1)


def _plain(
    group: Group,
    members: list[torch.Tensor],
    bias: torch.Tensor | None,
    position: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """By batched matrix products, which on a CPU are several times as fast. Each (slots, heads, size)."""
    heads = members[1].shape[1]
    query, key, value = (_by_head(part, group.texts, heads) for part in members)
    shape = group.texts, members[0].shape[1], group.rows
    found: torch.Tensor = _Plain.apply(query, key, value, bias, position, shape, scaling, dropout)  # type: ignore[no-untyped-call]
    return found.view(*shape, -1).transpose(1, 2).flatten(0, 1)


def _by_head(slots: torch.Tensor, texts: int, heads: int) -> torch.Tensor:
    """(slots, heads × shared, size) to (texts × heads, shared × room, size)."""
    found = slots.view(texts, -1, *slots.shape[1:]).transpose(1, 2)
    return found.reshape(texts * heads, -1, slots.shape[2])


class _Plain(torch.autograd.Function):
    """softmax(scaling · query · keyᵀ + bias + position), with dropout, times value; its gradient as in Dao et al.
    2022, B.2.

    query (batch, shared × rows, size), key and value (batch, columns, size), batch = texts × heads; shape: texts, heads
    of the queries, rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        position: torch.Tensor | None,
        shape: tuple[int, int, int],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        scores = _product(query, key.transpose(1, 2), scaling)
        by_text = scores.view(*shape, -1)
        for added in (bias, position):
            if added is not None:
                by_text += added
        weights = scores.softmax(-1)
        kept = weights * keep_mask(weights.shape, dropout, weights.dtype) if dropout else weights
        ctx.shape, ctx.scaling, ctx.scale = shape, scaling, kept_scale(dropout)
        ctx.save_for_backward(query, key, value, position, weights, kept)
        return _product(kept, value, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, position, weights, kept = ctx.saved_tensors
        of_value = _product(kept.transpose(1, 2), gradient, ctx.scale)
        inner = _product(gradient, value.transpose(1, 2), ctx.scale).mul_(kept)
        of_scores = inner.addcmul_(weights, inner.sum(-1, keepdim=True), value=-1)
        of_query = _product(of_scores, key, ctx.scaling)
        of_key = _product(of_scores.transpose(1, 2), query, ctx.scaling)
        of_position = None
        if ctx.needs_input_grad[4]:
            of_position = of_scores.view(*ctx.shape, -1).sum_to_size(position.shape).to(position.dtype)
        return of_query, of_key, of_value, None, of_position, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled before it is rounded."""
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=scale)
