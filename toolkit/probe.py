"""A look before the first step: does a gradient come to all that is trained, and to nothing else?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from toolkit.adapters import begins_at_zero
from toolkit.errors import ModelError
from toolkit.precision import Precision
from toolkit.tasks import Batch, Task


def probe_gradients(model: nn.Module, task: Task, batch: Batch, precision: Precision) -> None:
    """One forward and backward on the plain model, after which gradients and random numbers are as they were.

    Every trainable parameter must get a gradient of its own type, finite and not zero everywhere, but where the method
    begins with zeros (LoRA's A, while B is zero); a frozen one must get none.

    Args:
        model: with frozen and trainable parameters, not yet laid over the ranks.
        task: gives the loss.
        batch: on the model's device, with something in it.
        precision: of the run; where it is reduced, products are computed in bf16.

    Raises:
        ModelError: naming the parameters.
    """
    named = dict(model.named_parameters())
    before, training = {name: p.grad for name, p in named.items()}, model.training
    device = next(model.parameters()).device
    try:
        model.train()
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Not fp16, in which a gradient may vanish where nothing scales the loss.
            with torch.autocast(device.type, torch.bfloat16, enabled=precision.reduced):
                loss = task.loss(model(**batch.inputs), batch)
            if not loss.requires_grad:
                _refuse("the loss depends on no trainable parameter", [n for n, p in named.items() if p.requires_grad])
            loss.backward()  # type: ignore[no-untyped-call]
        found = {name: _fault(name, parameter) for name, parameter in named.items()}
        for fault in dict.fromkeys(found.values()):
            if fault:
                _refuse(fault, [name for name, its in found.items() if its == fault])
    finally:
        model.train(training)
        for name, parameter in named.items():
            parameter.grad = before[name]


def _fault(name: str, parameter: nn.Parameter) -> str:
    gradient = parameter.grad
    if not parameter.requires_grad:
        return "" if gradient is None else "a gradient comes to what is frozen"
    if gradient is None:
        return "no gradient comes to what is to be trained"
    if gradient.dtype != parameter.dtype or parameter.dtype != torch.float32:
        return f"a gradient of {gradient.dtype} comes to parameters of {parameter.dtype}"
    if not bool(gradient.isfinite().all()):
        return "the gradient is not finite before the first step"
    if not bool(gradient.any()) and not begins_at_zero(name):
        return "the gradient is zero everywhere"
    return ""


def _refuse(fault: str, names: Sequence[str]) -> None:
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    raise ModelError(
        f"{fault}: {len(names)} parameters ({shown})",
        "Something in the model cuts it off, or does not use it: choose what is trained with --adapter.targets, "
        "--adapter.train or --model.freeze.",
    )
