"""AdamW with parameter groups, and a learning rate that is a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.config import OptimConfig
from toolkit.errors import ConfigError
from toolkit.low_bit_optim import SMALLEST, LowBitAdamW


@dataclass(frozen=True)
class Schedule:
    """Learning rate at each optimizer step.

    Attributes:
        kind: `linear`, `cosine`, `constant` or `wsd` (warm-up, stable, decay; Hu et al. 2024, section 4).
        peak: highest rate.
        total_steps, warmup_steps, decay_steps: in optimizer steps; `decay_steps` counts for `wsd` alone.
        final_share: rate after the last step, as a share of the peak.
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int
    decay_steps: int
    final_share: float

    def __call__(self, step: int) -> float:
        """The rate of the step with this number; the first step is number 1."""
        done = step - 1
        if done < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        start = self.total_steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        progress = min(max((done - start) / max(self.total_steps - start, 1), 0.0), 1.0)
        return self.peak * (self.final_share + (1 - self.final_share) * self._shape(progress))

    def _shape(self, progress: float) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress


def build_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The schedule over `total_steps` optimizer steps.

    Raises:
        ConfigError: a warm-up longer than the run, or a setting that this kind of schedule does not read.
    """
    if config.decay_share is not None and config.schedule != "wsd":
        raise ConfigError(f"--optim.decay_share has no effect on the {config.schedule} schedule", "Drop it or use wsd.")
    if config.final_share is not None and config.schedule == "constant":
        raise ConfigError("--optim.final_share has no effect on the constant schedule", "Drop it or use linear.")
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_share * total_steps)
    decay = round((config.decay_share or 0.2) * total_steps) if config.schedule == "wsd" else 0
    if warmup + decay > total_steps or (warmup == total_steps and config.warmup_steps is not None):
        raise ConfigError(
            f"a warm-up of {warmup} steps{f' and a decay of {decay}' if decay else ''} does not fit in "
            f"{total_steps} steps",
            "Set --optim.warmup_steps lower or train longer.",
        )
    return Schedule(config.schedule, config.lr, total_steps, warmup, decay, config.final_share or 0.0)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_ratio: float = 1.0, *, eight_bits: bool = False
) -> list[dict[str, object]]:
    """The trainable parameters, with decay for matrices and without for vectors (biases, norms, scales) and scalars.

    Args:
        model: wrapped or not.
        weight_decay: of the matrices.
        lr_ratio: LoRA+, the learning rate of an adapter's second factors over that of all else (Hayou et al. 2024);
            a group keeps it as its `multiple`.
        eight_bits: keep apart, as a group's `bits`, the large matrices whose moments can do with 8 bits. Those of
            embeddings cannot: few of their rows have a gradient in a step.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {
        (matrix, second, bits): [] for matrix in (True, False) for second in (False, True) for bits in (8, 32)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # IA³'s vectors lie in rows and columns, and begin at one.
            matrix = parameter.ndim >= 2 and ".ia3_l." not in name
            large = matrix and parameter.numel() >= SMALLEST and id(parameter) not in tables
            second = ".lora_B." in name and lr_ratio != 1
            groups[matrix, second, 8 if large and eight_bits else 32].append(parameter)
    return [
        {"params": params, "weight_decay": weight_decay if matrix else 0.0, "multiple": lr_ratio if second else 1.0}
        | ({"bits": bits} if eight_bits else {})
        for (matrix, second, bits), params in groups.items()
        if params
    ]


def adamw(model: nn.Module, config: OptimConfig, lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of `model`, wrapped or not; `lr_ratio` as for `parameter_groups`.

    torch's, fused, or that over bitsandbytes.
    """
    groups = parameter_groups(model, config.weight_decay, lr_ratio, eight_bits=config.name.endswith("-8bit"))
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    return LowBitAdamW(groups, paged=config.name.startswith("paged-"), **options)


def check_optimizer(config: OptimConfig, strategy: str, device: torch.device, *, offloads: bool) -> None:
    """Refuse an optimizer that would have no effect, or that no test covers.

    Raises:
        ConfigError: naming the reason and the remedy.
    """
    key = f"--optim.name {config.name}"
    if config.name.startswith("paged-") and (device.type != "cuda" or offloads):
        where = "of what is offloaded, which lies in the host's memory" if offloads else f"on {device.type} ranks"
        other = "adamw-8bit" if config.name.endswith("-8bit") else "adamw"
        raise ConfigError(
            f"{key} has no effect {where}: its pages move between a GPU and the host", f"Use --optim.name {other}."
        )
    if config.name != "adamw" and strategy == "diloco":
        raise ConfigError(
            f"{key}: DiLoCo averages the moments of its ranks, and those of this optimizer are none in fp32",
            "Use --optim.name adamw, or another strategy.",
        )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give each group of an optimizer, torch's or DeepSpeed's, its multiple of the scheduled rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("multiple", 1.0)
