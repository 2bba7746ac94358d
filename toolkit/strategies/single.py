"""One process, one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from toolkit.errors import ConfigError
from toolkit.strategies.base import Layout, TorchStrategy


class Single(TorchStrategy):
    """The plain model."""

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]] = {"single": (Layout(1),)}
    averages_over_ranks = False

    def check(self) -> None:
        """Refuse several processes: each would train a model of its own."""
        super().check()
        if self.world.size > 1:
            raise ConfigError(
                f"--strategy.name single on {self.world.size} processes would train {self.world.size} separate models",
                "Use ddp, fsdp or zero1–zero3, or start one process.",
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """As it is."""
        return model.to(self.world.device)
