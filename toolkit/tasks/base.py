"""The contract between data, task and engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toolkit.compute.host import on_device
from toolkit.world import World


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        inputs: keyword arguments of the model, each (B, …).
        labels: targets, first dimension B.
        weights: (B,) fp32; 0 for the filler row of an empty micro-batch, else 1.
        ids: the samples' ids; none for the filler.
        skipped: id and fault of each sample that was dealt to this micro-batch but cannot be trained on.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    weights: torch.Tensor
    ids: list[int]
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; the copies are queued, and remember what the host knew (`compute.host`)."""
        if device.type == "cpu":
            return self
        moved = {name: on_device(tensor, device) for name, tensor in self.inputs.items()}
        return replace(
            self, inputs=moved, labels=on_device(self.labels, device), weights=on_device(self.weights, device)
        )

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; called by torch's DataLoader."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return replace(self, inputs=pinned, labels=self.labels.pin_memory(), weights=self.weights.pin_memory())


class Task(ABC):
    """The meaning of a batch. The loss is a SUM over units; only the engine divides, by the units of all ranks."""

    unit: str
    """What one unit is, in the plural: samples, tokens."""
    smooths_labels: bool = False
    """Whether the training loss reads label smoothing."""
    fills_up: bool = False
    """Whether batches can be `filled` up to few shapes, and the loss asks nothing of the device."""

    @abstractmethod
    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """Samples in columns as a micro-batch; `empty` marks its rows as filler that must not count."""

    def filled(self, batch: Batch, size: int, length: int) -> Batch:
        """The same with filler, samples that count nothing: so many samples of such a length, or what is possible."""
        raise NotImplementedError

    def problem(self, row: Mapping[str, Any]) -> str:
        """Why this sample cannot be trained on, or an empty string: a pure function of the sample."""
        return ""

    def learnt(self, batch: Batch) -> torch.Tensor:
        """Which tokens of `input_ids` are predicted, as they are: (B, L) bool; by default none."""
        return torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)

    def shown(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a reader is shown of `batch`, each (B, L): token ids, whether they are there, and which are learnt."""
        return batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), self.learnt(batch)

    def title(self, batch: Batch, row: int) -> str:
        """What a row of `batch` is, for a reader: its label, its place in the sample; empty where that is plain."""
        return ""

    def survey(self, batches: Sequence[Batch], forward: Callable[[Batch], Any], world: World) -> None:  # noqa: B027
        """Look at all micro-batches of a step before the first is learnt from; by default there is nothing to see.

        For losses that hold a sample against the others of its step, whatever micro-batch and rank they are in.
        Collective: every rank makes the same number of forwards.

        Args:
            batches: of this rank, not yet on its device; what is found out can be left on them.
            forward: the model's outputs for one of them.
            world: connected ranks.
        """

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """Units of `batch` that count."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Training loss summed over the units of `batch`: a scalar in fp32."""

    @abstractmethod
    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Counts of `batch` that add up over batches and ranks: fp64 tensors of fixed shapes.

        `units` and `loss` (the loss without regularisation, summed) are always among them.
        """

    def conclude(self, world: World) -> dict[str, torch.Tensor]:
        """Counts of this rank, as of `measure`, that are known only when all batches have been measured. Collective.

        For figures that hold a sample against all others of an evaluation; by default there are none.
        """
        return {}

    @abstractmethod
    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Figures from the summed counts, JSON-able; `loss` (mean over units) and `units` are always among them."""


def problem_of_tokens(values: Any, vocabulary: int, positions: int | None) -> str:
    """Why a model with so many tokens and positions (None: any number) cannot take these, or an empty string."""
    tokens = whole_numbers(values)
    if tokens is None:
        return "its tokens are not a list of whole numbers"
    if not len(tokens):
        return "it has no tokens"
    if positions is not None and len(tokens) > positions:
        return f"it has {len(tokens)} tokens, of which the model takes {positions}"
    strange = tokens[(tokens < 0) | (tokens >= vocabulary)]
    return f"token id {strange[0]} is not among the model's {vocabulary}" if len(strange) else ""


def whole_numbers(values: Any) -> npt.NDArray[Any] | None:
    """One dimension of integers, possibly empty; None for anything else."""
    try:
        found = np.asarray(values)
    except ValueError:  # lists of unlike lengths
        return None
    # An empty list has no type of its own: numpy makes it one of floats.
    return found if found.ndim == 1 and (found.dtype.kind in "iu" or not found.size) else None
