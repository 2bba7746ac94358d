"""The contract of a strategy: how a model, its gradients and its optimizer are laid over the ranks.

The engine speaks to a strategy in four verbs (`forward`, `backward`, `update`, `weights`) and never asks which one
it is. `TorchStrategy` serves those whose optimizer is torch's own.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from toolkit.config import StrategyConfig
from toolkit.data.loader import BatchShape
from toolkit.errors import ConfigError
from toolkit.optim import set_learning_rate
from toolkit.precision import LossScaler, Precision, Reduced, hold_reduced
from toolkit.quantization import without_low_bits
from toolkit.strategies.state import MOMENTS, FlatShard, adam_state, held_apart, put_back, whole
from toolkit.world import World

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        grad_norm: global norm of the gradient before clipping; not finite where the step was skipped or must stop.
        applied: False where the loss scaler skipped the step.
        loss_scale: the scale that the step used, for fp16 only.
    """

    grad_norm: float
    applied: bool
    loss_scale: float | None = None


@dataclass(frozen=True)
class Layout:
    """A smallest world in which a strategy is active: the parity tests and the support matrix enrol it."""

    ranks: int
    options: Mapping[str, Any] = field(default_factory=dict)


class Strategy(ABC):
    """One way to train on many ranks.

    Args:
        name: as the user wrote it.
        config: its options.
        world: connected ranks.
        precision: of forward and backward.
        shape: of the batches.
        max_grad_norm: clip to this global norm, or None.
    """

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]]
    """For each name that this class serves, the worlds in which it is tested."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Fields of StrategyConfig that it reads."""

    model: nn.Module
    """What `forward` calls: the wrapped model."""
    _training: bool | None = None
    left_out: frozenset[str] = frozenset()
    """Names of frozen weights that no checkpoint holds: those who go on bring them along. Set before `setup`, which may
    round them to the precision of a step."""

    def __init__(
        self,
        name: str,
        config: StrategyConfig,
        *,
        world: World,
        precision: Precision,
        shape: BatchShape,
        max_grad_norm: float | None,
    ) -> None:
        self.name = name
        self.config = config
        self.world = world
        self.precision = precision
        self.shape = shape
        self.max_grad_norm = max_grad_norm

    def check(self) -> None:
        """Refuse settings that cannot take effect, before anything is loaded.

        Raises:
            ConfigError: naming the key, the reason and the remedy.
        """
        unset = StrategyConfig()
        for key in (option.name for option in fields(StrategyConfig)):
            if key not in ("name", *self.options) and getattr(self.config, key) != getattr(unset, key):
                raise ConfigError(
                    f"--strategy.{key} has no effect under strategy {self.name}",
                    "Drop it, or choose a strategy that reads it.",
                )
        offloads = self.config.offload not in (None, "none")
        if offloads and self.world.device.type == "cpu":
            raise ConfigError(
                f"--strategy.offload {self.config.offload} has no effect on CPU ranks, whose memory it would move to",
                "Drop it, or run on GPUs.",
            )

    def require_ranks(self, what: str) -> None:
        """Refuse a strategy that needs company on one process."""
        if self.world.size == 1:
            raise ConfigError(
                f"strategy {self.name} has no effect on one process: there is nobody to {what}",
                "Start more processes (`accelerate launch --config_file configs/accelerate/cpu2.yaml …`, or "
                "`--multi_gpu --num_processes N`), or use --strategy.name single.",
            )

    @abstractmethod
    def setup(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Lay `model` (fp32, equal on all ranks) over the ranks and build its optimizer."""

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward of one micro-batch; gradients are reduced after the `last` of a step."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The model's outputs, computed in the precision asked for."""

    def generate(self, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Token ids (rows, length) that the model writes for `inputs`, as its own `generate` of transformers does.

        Collective: all ranks compute until the last of them has written its texts.
        """
        model: Any = self.module
        found: torch.Tensor = model.generate(**inputs, synced_gpus=self.world.size > 1, **options)
        return found

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`: the local sum divided by the units of all ranks.

        Summed over ranks and micro-batches this is the gradient of the step's mean; what the wrapper averages over
        the ranks is undone here.
        """

    def gradient_norm(self) -> torch.Tensor | None:
        """The global norm of the gradient, () on the device, which is not waited for; None where `update` finds it.

        Collective; after the last `backward` of a step.
        """
        return None

    @abstractmethod
    def update(self, learning_rate: float, grad_norm: float | None = None) -> Update:
        """Clip, step and clear the gradients. Nothing is applied where the gradient is not finite.

        Args:
            learning_rate: of this step.
            grad_norm: what `gradient_norm` gave; by default it is asked for, and waited for.
        """

    def set_training(self, on: bool) -> None:
        """Dropout and its kin on or off in the whole model; asked again it is done already, for it takes its time."""
        if on != self._training:
            self.model.train(on)
            self._training = on

    @property
    def synchronized(self) -> bool:
        """Whether all ranks hold one training state, as most strategies let them do after each step."""
        return True

    def synchronize(self) -> None:  # noqa: B027  (those that are synchronized have nothing to do)
        """Let all ranks hold one training state: before it is evaluated, and at the end. Collective."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Full weights by the plain model's names, in fp32 on the CPU of rank 0, empty elsewhere. Collective.

        Those of quantized layers are not among them, nor is what is `left_out`.
        """

    def _to_save(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a state dict."""
        kept = without_low_bits(self.module, state)
        return {name: tensor for name, tensor in kept.items() if name not in self.left_out}

    @abstractmethod
    def shards(self) -> dict[str, FlatShard]:
        """The training state that this rank holds, in place: to be copied for a checkpoint, or filled from one.

        `weights/NAME` (fp32), `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` of each trainable parameter,
        `weights/NAME` of each frozen one, and `buffers/NAME`, by the plain model's names. `outer/NAME` is of a strategy
        alone: where a checkpoint has none, it begins at zero.
        """

    def saved(self) -> dict[str, FlatShard]:
        """The shards that a checkpoint holds."""
        return {name: shard for name, shard in self.shards().items() if name.partition("/")[2] not in self.left_out}

    @abstractmethod
    def loaded(self) -> None:
        """The shards have been filled: bring what the engine derives from them up to date. Collective."""

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """fp16's loss scale and the steps since it changed; empty for other precisions."""

    @abstractmethod
    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Go on with what `scaler_state` gave, under whichever strategy; empty leaves it as it is."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients of a step that is not to be applied; the caller then fills the shards anew."""

    @abstractmethod
    def effective(self) -> dict[str, Any]:
        """What is in force, read back from the engine's objects, JSON-able."""

    @property
    def module(self) -> nn.Module:
        """The model without a wrapper around it."""
        return self.model

    def teardown(self) -> None:
        """Drop the model and what hangs on it, before the ranks part."""
        del self.model


class TorchStrategy(Strategy):
    """Strategies whose gradients are tensors (or DTensors) on parameters and whose optimizer is torch's."""

    averages_over_ranks: ClassVar[bool] = True
    """Whether the wrapper divides summed gradients by the number of ranks."""
    casts: ClassVar[bool] = False
    """Whether the wrapper computes in the precision asked for by itself."""
    keeps_gradients = False
    """Whether gradients lie where they are from step to step, and are set to zero."""

    optimizer: torch.optim.Optimizer

    def setup(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Wrap, then build the optimizer over the wrapped parameters."""
        if self.precision.reduced:
            hold_reduced(model, self.left_out, self.precision.dtype)
        self.model = self.wrap(model)
        self.optimizer = build_optimizer(self.model)
        self.scaler = LossScaler(self.precision.name == "fp16")
        reduced = self.precision.reduced and not self.casts
        self._reduced = Reduced(self.model, self.precision.dtype) if reduced else None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, which is on the CPU, laid over the ranks and on their devices."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Nothing to hold back on one rank."""
        return contextlib.nullcontext()

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """With reduced copies of the parameters where the precision is reduced."""
        return self._reduced.forward(inputs) if self._reduced else self.model(**inputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """In the precision of `forward`."""
        with self._reduced.in_force() if self._reduced else contextlib.nullcontext():
            return super().generate(inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Scale for fp16 and for the wrapper's average, then backpropagate."""
        ranks = self.world.size if self.averages_over_ranks else 1
        scaled = loss * (ranks * self.scaler.scale)
        if self._reduced:
            self._reduced.backward(scaled)
        else:
            scaled.backward()  # type: ignore[no-untyped-call]

    def keep_gradients(self) -> None:
        """Let gradients lie where they are from step to step, where graphs add to them."""
        self.keeps_gradients = True
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    @contextlib.contextmanager
    def cast_anew(self) -> Iterator[None]:
        """Inside, the reduced copies of the parameters are made anew; they are of no use outside."""
        self._weights_changed()
        yield
        self._weights_changed()

    def gradient_norm(self) -> torch.Tensor:
        """Of the gradients without fp16's scale."""
        return self._total_norm(self._gradients()) / self.scaler.scale

    def update(self, learning_rate: float, grad_norm: float | None = None) -> Update:
        """Unscale and clip in one multiplication, then step."""
        scale, gradients = self.scaler.scale, self._gradients()
        norm = float(self.gradient_norm()) if grad_norm is None else grad_norm
        applied = self.scaler.update(norm) and math.isfinite(norm)
        if applied:
            clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
            if clip / scale != 1.0:
                torch._foreach_mul_(gradients, clip / scale)
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
            self._weights_changed()
        self.discard()
        return Update(norm, applied, scale if self.scaler.enabled else None)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the state dict."""
        if not self.world.main:
            return {}
        state = self._to_save(self.module.state_dict())
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def shards(self) -> dict[str, FlatShard]:
        """Parameter by parameter."""
        found = {}
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        apart = held_apart(self.optimizer)
        for name, parameter in self.module.named_parameters():
            found[f"weights/{name}"] = weights = self._shard(parameter)
            if parameter in groups:
                state = adam_state(self.optimizer, parameter, groups[parameter])
                found[f"step/{name}"] = whole(state["step"])
                for moment in MOMENTS:
                    held = replace(weights, data=state[moment], apart=True) if apart else self._shard(state[moment])
                    found[f"{moment}/{name}"] = held
        found |= {f"buffers/{name}": whole(buffer) for name, buffer in persistent_buffers(self.module)}
        return {name: shard for name, shard in found.items() if shard.data.numel()}

    def loaded(self) -> None:
        """The reduced copies are of other weights."""
        put_back(self.optimizer)
        self._weights_changed()

    def scaler_state(self) -> dict[str, float]:
        """Of our own scaler."""
        return self.scaler.state()

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Into our own scaler."""
        self.scaler.load_state(state)

    def discard(self) -> None:
        """Clear them."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def effective(self) -> dict[str, Any]:
        """Read from the parameters, the optimizer and the batches."""
        group = self.optimizer.param_groups[0]
        frozen = (p for p in self.module.parameters() if not p.requires_grad)
        return {
            "strategy": self.name,
            "engine": type(self.model).__name__,
            "ranks": self.world.size,
            "device": str(self.world.device),
            "precision": self.precision.name,
            "parameter_dtype": str(self._parameters[0].dtype).removeprefix("torch."),
            "frozen_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in frozen}),
            "global_batch": self.shape.global_batch,
            "micro_batch": self.shape.micro_batch,
            "accumulation": self.shape.accumulation,
            "optimizer": type(self.optimizer).__name__,
            "moment_bits": [group.get("bits", 32) for group in self.optimizer.param_groups],
            "betas": list(group["betas"]),
            "eps": group["eps"],
            "weight_decay": [group["weight_decay"] for group in self.optimizer.param_groups],
            "lr_multiples": [group["multiple"] for group in self.optimizer.param_groups],
            "max_grad_norm": self.max_grad_norm,
        }

    def teardown(self) -> None:
        """Drop the optimizer too: it holds the parameters."""
        del self.optimizer, self._parameters, self._reduced
        super().teardown()

    def _weights_changed(self) -> None:
        if self._reduced:
            self._reduced.forget()

    def _shard(self, tensor: torch.Tensor) -> FlatShard:
        return whole(tensor)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _total_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to the model's state."""
    persistent = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
