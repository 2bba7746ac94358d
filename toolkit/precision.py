"""Number formats: fp32, bf16, fp8 in bf16, and fp16 with dynamic loss scaling. Trainable parameters are fp32 in all."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.world import World

INITIAL_LOSS_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
MINIMUM_LOSS_SCALE = 1.0

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_FP8_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply fp8 (Ada; Hopper is 9.0)."""


@dataclass(frozen=True)
class Precision:
    """The number format of the forward and backward pass.

    Attributes:
        name: `fp32`, `bf16`, `fp16`, or `fp8`: bf16, in which the products of blocks are of 8 bits.
        reason: why it was taken, for the plan.
    """

    name: str
    reason: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of activations, and of products but for those of fp8."""
        return _DTYPES[self.name]

    @property
    def reduced(self) -> bool:
        """Whether it is narrower than fp32."""
        return self.name != "fp32"


def choose_precision(requested: str, world: World) -> Precision:
    """The format that `--precision` and the launcher's `--mixed_precision` ask for.

    Raises:
        ConfigError: where the two disagree or the hardware cannot do it.
    """
    launched = world.launcher.precision
    if launched and requested not in ("auto", launched):
        raise ConfigError(
            f"--precision {requested} contradicts the launcher's --mixed_precision {launched}",
            "Drop one of the two.",
        )
    name = launched or requested
    if name == "auto":
        if has_bf16(world.device):
            return Precision("bf16", "auto: the hardware multiplies bf16")
        return Precision("fp32", "auto: the hardware has no bf16 products")
    if name == "bf16" and world.device.type == "cuda" and not has_bf16(world.device):
        raise ConfigError("--precision bf16: this GPU has no bf16 products", "Use fp16 or fp32.")
    if name == "fp8" and world.device.type == "cuda" and torch.cuda.get_device_capability() < _FP8_CAPABILITY:
        raise ConfigError("--precision fp8: this GPU has no fp8 products", "Use bf16.")
    return Precision(name, "the launcher's --mixed_precision" if launched else "as asked")


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware (on a CPU: AMX or AVX512-BF16), so that it pays."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))


class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2).

    The scale halves when the global gradient norm is not finite, in which case the step is skipped, and
    doubles after `growth_interval` steps without that. It decides by the global norm, which is the same number
    on every rank, so that all ranks skip alike also when only one of them holds the shard that overflowed.
    """

    def __init__(self, enabled: bool, scale: float = INITIAL_LOSS_SCALE, growth_interval: int = GROWTH_INTERVAL):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.good_steps = 0

    def state(self) -> dict[str, float]:
        """What `load_state` takes; empty where nothing is scaled."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from there; an empty state (of a run in another precision) changes nothing."""
        if self.enabled and state:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])

    def update(self, grad_norm: float) -> bool:
        """Note the (scaled or not) global norm; whether the step may be applied."""
        if not self.enabled:
            return True
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
            return True
        self.scale, self.good_steps = max(self.scale / 2, MINIMUM_LOSS_SCALE), 0
        return False


def hold_reduced(model: nn.Module, names: Collection[str], dtype: torch.dtype) -> None:
    """Hold some parameters in the format in which a step uses them, and in no other.

    For those of a frozen base, which nothing trains and nobody saves: two bytes for each in the place of four, and two
    more for a copy. What is computed is the same to the bit.

    Args:
        model: not yet laid over the ranks.
        names: of the parameters, as the model has them. What is not in fp32, or is a parameter of another kind (in few
            bits), stays; so do tables that do more than read their rows.
        dtype: of the step.
    """
    scaled = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and type(m) is not nn.Embedding}
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and not parameter.requires_grad
        if name in names and plain and id(parameter) not in scaled:
            parameter.data = parameter.data.to(dtype)


class Reduced:
    """A model that computes with copies of its parameters in a lower precision, cast once a step.

    The parameters stay as they are and get their gradients in their own precision: an optimizer sees fp32 alone.
    Tables of embeddings are not copied, for a step reads few of their rows; what is read is cast.

    Args:
        model: wrapped or not.
        dtype: of the copies, and of what the model computes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._copies: dict[bool, list[torch.Tensor]] = {}
        owners = [module._parameters for module in model.modules()]
        uses = Counter(id(parameter) for owner in owners for parameter in owner.values())
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and uses[id(m.weight)] == 1]
        # Tables of sines are computed, and stand among the buffers, which keep their precision.
        sines = [m for m in model.modules() if "Sinusoidal" in type(m).__name__ and not isinstance(m, nn.Embedding)]
        for table in (*tables, *sines):
            table.register_forward_hook(lambda module, args, rows: rows.to(dtype))
        as_they_are = {id(table.weight) for table in tables}
        # Where each parameter stands; one that is tied stands in several places, and is cast once.
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
            (owner, name, parameter)
            for owner in owners
            for name, parameter in owner.items()
            if parameter is not None and parameter.dtype == torch.float32 and id(parameter) not in as_they_are
        ]

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The model's outputs."""
        with self.in_force():
            return self.model(**{name: self._to_dtype(value) for name, value in inputs.items()})

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate; what is computed a second time for that is computed with the copies too."""
        with self.in_force():
            loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """The parameters have changed: drop the copies."""
        self._copies = {}

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the model computes with the copies."""
        # Not torch's functional_call, which looks for all parameters each time (5 ms in a profile of BERT-base).
        grad = torch.is_grad_enabled()
        if grad not in self._copies:
            cast: dict[int, torch.Tensor] = {}
            for _, _, parameter in self._places:
                if id(parameter) not in cast:
                    cast[id(parameter)] = self._to_dtype(parameter)
            self._copies = {grad: [cast[id(parameter)] for _, _, parameter in self._places]}
        for (owner, name, _), copy in zip(self._places, self._copies[grad], strict=True):
            owner[name] = copy
        try:
            yield
        finally:
            for owner, name, parameter in self._places:
                owner[name] = parameter

    def _to_dtype(self, value: Any) -> Any:
        """What is no tensor, as keys and values of tokens that were there before, is in it already."""
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
