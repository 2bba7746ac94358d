"""The loss of a language model whose logits are never there as a whole.

Of 4,096 tokens and a vocabulary of 128,000, logits take 2 GB in fp32, and their gradient as much again. Here they are
computed chunk by chunk, together with what they give to the gradients, and forgotten.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100
"""Label of a position that predicts nothing, as torch's losses have it."""
CHUNK = 2**24
"""Logits that are there at once: 64 MB in fp32, and products that are still large enough to be fast."""
TOLERANCE = 1e-4
"""Largest difference of the loss to that of whole logits, relative to it: fp32 in another order."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T + bias`, summed over the labels that count.

    The gradient of each chunk's logits is at hand when their loss is, so both of its products are taken then and there
    (three products in all, as without chunks), and only those that somebody needs. Softmax and sums are in fp32.

    Args:
        hidden: (tokens, width).
        weight: (vocabulary, width), of the same type.
        labels: (tokens,) int64; `IGNORED` does not count, and costs nothing.
        bias: (vocabulary,).

    Returns:
        A scalar in fp32; 0, with gradients of 0, where no label counts.
    """
    # Not torch's own function of that name (2.13): in bf16 its sum has three digits, and on CPUs it took 4 to 11 times
    # as long as whole logits, where this one takes as long.
    counts = labels != IGNORED
    return _SummedLoss.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden[counts], weight, bias, labels[counts], torch.is_grad_enabled()
    )


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        grad: bool,
    ) -> torch.Tensor:
        wanted = [grad and needed for needed in ctx.needs_input_grad[:3]]
        loss = torch.zeros((), device=hidden.device)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Many small terms: added up in fp32.
        to_weight, to_bias = (
            torch.zeros(tensor.shape, device=tensor.device) if tensor is not None and want else None
            for tensor, want in zip((weight, bias), wanted[1:], strict=True)
        )
        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(labels), rows):
            part, label = hidden[start : start + rows], labels[start : start + rows, None]
            logits = F.linear(part, weight, bias).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(1, label)).sum()
            if not any(wanted):
                continue
            # The gradient of the logits: the softmax, less one at the label.
            gradient = logits.sub_(log_sum).exp_()
            gradient.scatter_add_(1, label, gradient.new_full(label.shape, -1.0))
            if to_bias is not None:
                to_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[start : start + rows])
            if to_weight is not None:
                _add_product(to_weight, gradient.t(), part)
        ctx.gradients = (to_hidden, to_weight, to_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add the product of two matrices to `total`, which is in fp32."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def fuse_loss(model: Any) -> str:
    """Let a causal language model give its summed loss in the place of logits, if that changes nothing else.

    It does so where it is called with `labels` (texts, length), which are aligned: a position's label is the token
    that it is to predict, or `IGNORED`. Its output's `logits` are then the loss, (1,), in fp32. Without labels it
    computes as before.

    Args:
        model: of transformers, in fp32 on the CPU, not yet laid over the ranks.

    Returns:
        Why the model stays as it was; empty where it now does so.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its output layer is a {type(head).__name__}"
    fused = _Head(model, head)
    try:
        whole, without = _probe(model, fused)
        difference = abs(without - whole) / abs(whole)
        why = f"its loss would differ by {difference:.1e}" if not difference <= TOLERANCE else ""
    except Exception as error:  # what a model raises that wants to do something to its logits is its own affair
        why = f"it does not do without logits: {error}"
    if why:
        fused.leave()
    return why


class _Head:
    """The hooks on a model and its output layer."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        self._labels: torch.Tensor | None = None
        self._head = head
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]
        # Its parameters are looked up in each forward: others may have taken their place until then.
        head.forward = functools.partial(self._forward, head.forward)  # type: ignore[method-assign]

    def leave(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        del self._head.forward

    def _take_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._labels = kwargs.get("labels")
        return args, {name: value for name, value in kwargs.items() if name != "labels"}

    def _forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._labels = None

    def _forward(self, plain: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self._labels is None:
            return plain(hidden)  # type: ignore[no-any-return]
        head, labels = self._head, self._labels.flatten()
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels, head.bias)[None]


@torch.no_grad()
def _probe(model: Any, fused: _Head) -> tuple[float, float]:
    """The loss of two short texts from whole logits, and without them."""
    training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16).view(2, 8) * 7919 % vocabulary
    labels = ids.roll(-1, 1)
    labels[1, 5:] = IGNORED
    logits = model(input_ids=ids).logits
    whole = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    without = model(input_ids=ids, labels=labels).logits
    model.train(training)
    return float(whole), float(without)
