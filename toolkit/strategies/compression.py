"""Gradients that are sent smaller than they are: torch's own communication hooks of DistributedDataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from toolkit.config import StrategyConfig
from toolkit.errors import ConfigError

_RANK, _START = 4, 10
_SEED = 0
# A matrix whose gradient is zero, or of a lower rank than is kept, would otherwise be divided by zero.
_EPSILON = 1e-8


def check_compression(config: StrategyConfig, precision: str) -> None:
    """Refuse settings of PowerSGD without it, and PowerSGD under fp16.

    Raises:
        ConfigError: naming the key.
    """
    if config.compress != "powersgd":
        for key in ("compress_rank", "compress_start"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"--strategy.{key} has no effect with --strategy.compress {config.compress}",
                    "Drop it, or use --strategy.compress powersgd.",
                )
    elif precision == "fp16":
        raise ConfigError(
            "--strategy.compress powersgd does not work with --precision fp16: a gradient that overflows, as fp16's "
            "loss scale lets happen, would stay in the error that is fed back",
            "Use --precision bf16 or fp32, or --strategy.compress bf16.",
        )


def compress(model: DistributedDataParallel, config: StrategyConfig) -> None:
    """Register the hook that `config` asks for.

    Raises:
        ConfigError: PowerSGD at this rank would make no matrix of the model smaller.
    """
    if config.compress == "bf16":
        model.register_comm_hook(None, _bf16)
    elif config.compress == "powersgd":
        state = PowerSGDState(
            process_group=None,
            matrix_approximation_rank=config.compress_rank or _RANK,
            start_powerSGD_iter=config.compress_start or _START,
            orthogonalization_epsilon=_EPSILON,
            random_seed=_SEED,
        )
        if not any(_smaller(parameter, state) for parameter in model.parameters() if parameter.requires_grad):
            raise ConfigError(
                f"--strategy.compress_rank {state.matrix_approximation_rank} makes no matrix of this model smaller",
                "Choose a lower rank, or --strategy.compress bf16.",
            )
        model.register_comm_hook(state, _powersgd)


def forget(model: DistributedDataParallel) -> None:
    """What PowerSGD carries from step to step begins anew, alike on all ranks."""
    for _, state in model._comm_hooks:
        if isinstance(state, PowerSGDState):
            for carried in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                carried.clear()
            state.iter = 0
            state.rng.seed(_SEED)


def effective(model: DistributedDataParallel) -> dict[str, Any]:
    """Read from the hook that is registered."""
    if not model._comm_hooks:
        return {"compress": "none"}
    hook, state = model._comm_hooks[0]
    if not isinstance(state, PowerSGDState):
        return {"compress": hook.__name__.removeprefix("_")}
    return {
        "compress": "powersgd",
        "compress_rank": state.matrix_approximation_rank,
        "compress_start": state.start_powerSGD_iter,
        "compress_on_resume": "the error fed back begins at zero, and compress_start counts anew",
    }


# torch reads a hook's annotations, and would not take them as the texts that they are in this file.


# By its own name, torch takes the hook for NCCL and XCCL alone; gloo adds up bf16 too.
def _bf16(group, bucket):  # type: ignore[no-untyped-def]
    return bf16_compress_hook(group, bucket)


def _powersgd(state, bucket):  # type: ignore[no-untyped-def]
    future = powerSGD_hook(state, bucket)
    if bucket.buffer().device.type == "cpu":
        # Each of its three sums begins where the one before has come in. gloo's come in at other moments on other
        # ranks: those of the next bucket would get between, and ranks would add up what does not belong together.
        future.wait()
    return future


def _smaller(parameter: nn.Parameter, state: PowerSGDState) -> bool:
    """Whether the hook would compress it: the rule of torch."""
    rows, columns = parameter.shape[0] if parameter.dim() else 1, parameter[0].numel() if parameter.dim() else 1
    rank = min(rows, columns, state.matrix_approximation_rank)
    return bool((rows + columns) * rank * state.min_compression_rate < rows * columns)
