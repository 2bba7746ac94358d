"""CUDA graphs: forward and backward of a micro-batch launched at once, in the place of one kernel after the other.

The kernels of a small network take less time than Python takes to launch them. A graph launches what was recorded, and
is of one shape; so micro-batches are filled up to few shapes, and there is a graph for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from toolkit.compute.host import pinned
from toolkit.compute.texts import Texts, few_sizes
from toolkit.errors import ConfigError
from toolkit.strategies.base import TorchStrategy
from toolkit.tasks import Batch, Task

Learn = Callable[[Batch, torch.Tensor], torch.Tensor]
"""Forward and backward of a micro-batch on the device, given the units of the step: its share of the loss."""
Shape = tuple[int, int, int, int]
"""Samples, length, tokens of the row without padding, and what those are a multiple of."""
MOST = 64
"""Graphs that are recorded; what has another shape then goes without."""
SHORTEST = 32
"""Lengths are rounded up to powers of two from here."""


def check_graphs(strategy: Any, checkpointing: str, low_bit: bool) -> None:
    """Refuse graphs where they cannot be.

    Args:
        strategy: chosen, not yet set up.
        checkpointing: kind of activation checkpointing.
        low_bit: whether the base of an adapter is quantized.

    Raises:
        ConfigError: naming reason and remedy.
    """
    where = {
        "a CPU, which launches nothing": strategy.world.device.type != "cuda",
        f"strategy {strategy.name}, whose processes meet in between": strategy.name != "single",
        f"--precision {strategy.precision.name}: only attention in bf16 is recorded": strategy.precision.name != "bf16",
        "activation checkpointing, which asks for the state of random numbers": checkpointing != "none",
        "a quantized base": low_bit,
    }
    for what, is_so in where.items():
        if is_so:
            raise ConfigError(f"--train.cuda_graphs does not work with {what}", "Drop it.")


def check_recordable(task: Task, padding: str) -> None:
    """Refuse graphs where shapes cannot be few: the task has no filler, or texts lie in batches with padding.

    Raises:
        ConfigError: naming the reason.
    """
    if not task.fills_up:
        raise ConfigError(
            f"--train.cuda_graphs does not work with the task {type(task).__name__}, whose shapes are too many",
            "Drop it: graphs are for networks that are small beside their batches.",
        )
    if padding != "none":
        raise ConfigError(f"--train.cuda_graphs needs a model without padding; it is padded {padding}", "Drop it.")


class Graphs:
    """Forward and backward of micro-batches, recorded by shape.

    What has a shape for the first time is computed kernel by kernel, which prepares all that a recording needs.

    Args:
        strategy: set up, of one process.
        task: fills batches up.

    Attributes:
        seconds: spent on recording.
    """

    def __init__(self, strategy: TorchStrategy, task: Task) -> None:
        self._strategy, self._task = strategy, task
        self._met: set[Shape] = set()
        self._graphs: dict[Shape, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.seconds = 0.0
        strategy.keep_gradients()

    @property
    def shapes(self) -> int:
        """How many have been recorded."""
        return len(self._graphs)

    def learn(self, batch: Batch, units: torch.Tensor, learn: Learn) -> torch.Tensor:
        """What `learn` makes of `batch`, which is on the CPU, filled up. The result is good until the next one."""
        size, length = batch.inputs["attention_mask"].shape
        # A power of two, for lengths vary from batch to batch; all that is computed on padding are embeddings.
        batch = self._task.filled(batch, few_sizes(size)[0], max(SHORTEST, 1 << (length - 1).bit_length()))
        mask = batch.inputs["attention_mask"]
        shape: Shape = (*mask.shape, *few_sizes(int(mask.sum())))
        graph = self._graphs.get(shape)
        if graph is None and shape in self._met and len(self._graphs) < MOST:
            began = time.monotonic()
            with self._strategy.cast_anew():
                graph = _Graph(batch, shape[3], learn, self._strategy.world.device, self._pool)
            self._graphs[shape] = graph
            self.seconds += time.monotonic() - began
        self._met.add(shape)
        if graph is None:
            return learn(batch.to(self._strategy.world.device), units)
        return graph.replay(batch, units)


class _Graph:
    """What is launched for one shape, and the places in memory that it reads from."""

    def __init__(self, batch: Batch, multiple: int, learn: Learn, device: torch.device, pool: Any) -> None:
        self._batch, self._units = batch.to(device), torch.ones((), device=device)
        self._texts = Texts(batch.inputs["attention_mask"].bool(), device, multiple)
        self._batch.inputs["attention_mask"].laid = self._texts  # type: ignore[attr-defined]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (which pin memory) go on meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._loss = learn(self._batch, self._units)

    def replay(self, batch: Batch, units: torch.Tensor) -> torch.Tensor:
        for name, there in self._batch.inputs.items():
            there.copy_(pinned(batch.inputs[name]), non_blocking=True)
        self._batch.labels.copy_(pinned(batch.labels), non_blocking=True)
        self._batch.weights.copy_(pinned(batch.weights), non_blocking=True)
        self._texts.refill(batch.inputs["attention_mask"].bool())
        self._units.copy_(units)
        self._graph.replay()
        return self._loss
