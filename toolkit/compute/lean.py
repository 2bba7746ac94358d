"""Norms and gated layers that keep less for the backward pass, and compute what they left out again.

A root mean square norm, as models of the hub write it, keeps a copy of its input in fp32 and what it made of it before
the weight; a gated layer keeps its activation beside what that was made from. Here the norm keeps its input and one
number for each token, and the gated layer its two halves. Both go by in parts that stay in a core's cache.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import gelu, rms_norm, silu
from transformers.activations import ACT2CLS, NewGELUActivation

PART = 2**18
"""Elements of a part on a CPU: half a megabyte for each of two cores in fp32. With a quarter of it, or all at once, a
norm takes up to twice as long."""

_TANH = {"approximate": "tanh"}
_SILU = silu, torch.ops.aten.silu_backward.grad_input
_GELU = gelu, torch.ops.aten.gelu_backward.grad_input
_GELU_TANH = functools.partial(gelu, **_TANH), functools.partial(_GELU[1], **_TANH)  # type: ignore[arg-type]
_ACTIVATIONS: dict[type[nn.Module], tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    ACT2CLS["silu"]: _SILU,
    ACT2CLS["gelu"]: _GELU,
    ACT2CLS["gelu_pytorch_tanh"]: _GELU_TANH,
}
"""Of gated layers, and their gradients from (gradient, input)."""


def keep_less(model: nn.Module) -> int:
    """Let the norms and gated layers of a model keep less; returns how many do.

    A module is left alone where it would not give the numbers that it gave before.

    Args:
        model: not yet laid over the ranks.
    """
    count = 0
    for module in model.modules():
        if forward := _lean_forward(module):
            module.forward = types.MethodType(forward, module)
            count += 1
    return count


def _lean_forward(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    if type(module) is NewGELUActivation:  # written out, it keeps several tensors, and torch's kernel one
        return _new_gelu
    if _is_gated(module):
        return _gated_layer
    return _form_of_norm(module)


def _new_gelu(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
    return gelu(input, approximate="tanh")


# Norms


def _form_of_norm(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """How this module is to be computed, if it is a root mean square norm (Zhang & Sennrich 2019) in one of two forms.

    They differ in bf16: Llama's and T5's round before the weight, and Gemma's, which adds 1 to it, after it.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    values = torch.linspace(-2, 3, 4 * len(weight)).view(4, -1).sin()
    other = torch.linspace(0.5, -2, len(weight))
    for offset, late in ((0.0, False), (1.0, True)):
        form = functools.partial(_norm, eps=eps, offset=offset, late=late)
        if all(_alike(module, form, values.to(dtype), other.to(dtype)) for dtype in (torch.float32, torch.bfloat16)):
            return form
    return None


@torch.no_grad()
def _alike(module: nn.Module, forward: Callable[..., torch.Tensor], values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether both give the same bits, with this weight in the place of the module's own."""
    try:
        wanted = functional_call(module, {"weight": weight}, (values,))
    except Exception:  # what wants other inputs is its own affair
        return False
    return isinstance(wanted, torch.Tensor) and torch.equal(
        forward(types.SimpleNamespace(weight=weight), values), wanted
    )


def _norm(self: Any, hidden_states: torch.Tensor, *, eps: float, offset: float, late: bool) -> torch.Tensor:
    if hidden_states.is_cuda and not offset and hidden_states.dtype == self.weight.dtype:
        # One kernel, which keeps as little. It rounds after the weight.
        return rms_norm(hidden_states, self.weight.shape, self.weight, eps)
    return _Norm.apply(hidden_states, self.weight, eps, offset, late)  # type: ignore[no-any-return,no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, late: bool
    ) -> torch.Tensor:
        rows = values.reshape(-1, values.shape[-1])
        scales = rows.new_empty(len(rows), 1, dtype=torch.float32)
        result = torch.empty_like(rows, dtype=values.dtype if late else torch.result_type(values, weight))
        factor = weight.float() + offset if late else weight
        for part in _parts(rows):
            wide = rows[part].float()
            scale = scales[part] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            normed = wide * scale
            result[part] = (normed if late else normed.to(values.dtype)) * factor
        ctx.save_for_backward(values, weight, scales)
        ctx.offset, ctx.late = offset, late
        return result.view(values.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        values, weight, scales = ctx.saved_tensors
        rows, of_result = (tensor.reshape(-1, values.shape[-1]) for tensor in (values, gradient))
        of_values, of_weight = torch.empty_like(rows), None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
        factor = weight.float() + ctx.offset
        for part in _parts(rows):
            normed = rows[part].float() * scales[part]
            if of_weight is not None:
                of_weight += ((normed if ctx.late else normed.to(values.dtype)) * of_result[part].float()).sum(0)
            of_normed = of_result[part] * factor
            along = (of_normed * normed).mean(-1, keepdim=True)
            of_values[part] = of_normed.addcmul_(normed, along, value=-1).mul_(scales[part])
        return of_values.view(values.shape), None if of_weight is None else of_weight.to(weight.dtype), None, None, None


# Gated layers


def _is_gated(module: Any) -> bool:
    """Whether a module is a gated layer (Shazeer 2020) in the way of Llama: down(activation(gate(x)) · up(x))."""
    if type(getattr(module, "act_fn", None)) not in _ACTIVATIONS:
        return False
    # Its own forward, with other projections than its own, which may be large, or in few bits.
    values = torch.linspace(-3, 3, 32)
    projections = {"gate_proj": torch.sin, "up_proj": torch.exp, "down_proj": torch.neg}
    try:
        found = type(module).forward(types.SimpleNamespace(act_fn=module.act_fn, **projections), values)
    except Exception:  # it has other parts, or wants other inputs
        return False
    return torch.equal(found, -(module.act_fn(values.sin()) * values.exp()))


def _gated_layer(self: Any, x: torch.Tensor) -> torch.Tensor:
    product = _Gated.apply(self.gate_proj(x), self.up_proj(x), type(self.act_fn))  # type: ignore[no-untyped-call]
    return self.down_proj(product)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: type[nn.Module]) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        activation, _ = _ACTIVATIONS[kind]
        product = gate.new_empty(gate.shape)
        rows = [tensor.reshape(-1, gate.shape[-1]) for tensor in (gate, up, product)]
        for part in _parts(rows[0]):
            torch.mul(activation(rows[0][part]), rows[1][part], out=rows[2][part])
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        activation, backward = _ACTIVATIONS[ctx.kind]
        of_gate, of_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        rows = [tensor.reshape(-1, gate.shape[-1]) for tensor in (gate, up, gradient, of_gate, of_up)]
        for part in _parts(rows[0]):
            one, other, of_product, of_one, of_other = (tensor[part] for tensor in rows)
            torch.mul(of_product, activation(one), out=of_other)
            backward(of_product * other, one, grad_input=of_one)
        return of_gate, of_up, None


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """Rows of a matrix that go by together: some of them on a CPU, else all."""
    size = max(1, PART // rows.shape[-1]) if rows.device.type == "cpu" else max(1, len(rows))
    return (slice(start, start + size) for start in range(0, len(rows), size))
