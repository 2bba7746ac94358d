"""What goes with what: strategy, quantization and adapter. One table; what no test covers is refused, with the reason.

`toolkit matrix` prints it, docs/support-matrix.md is made of it, and the parity tests run each cell that it calls
tested.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from toolkit.adapters import ADAPT_OTHERWISE, NOT_QUANTIZED, QUANTIZE, QUANTIZED, READS
from toolkit.errors import ConfigError
from toolkit.prompts import PROMPTS
from toolkit.quantization import QUANTIZATIONS, LowBit
from toolkit.strategies.base import Strategy
from toolkit.strategies.choose import STRATEGIES

ADAPTERS = tuple(READS)
LOW = tuple(name for name in QUANTIZATIONS if name != "none")
FOUR_BITS = tuple(name for name in LOW if name != "int8")


@dataclass(frozen=True)
class Refusal:
    """Cells that are refused for one reason."""

    strategies: tuple[str, ...]
    quantizations: tuple[str, ...]
    adapters: tuple[str, ...]
    reason: str
    remedy: str


@dataclass(frozen=True)
class Cell:
    """One strategy with one quantization and one adapter; tested, where no refusal stands against it."""

    strategy: str
    quantization: str
    adapter: str
    refusal: Refusal | None

    @property
    def tested(self) -> bool:
        """Whether it is allowed, and a test runs it."""
        return self.refusal is None


ANY = tuple(STRATEGIES)
REFUSALS = (
    *(Refusal(ANY, LOW, (name,), reason, ADAPT_OTHERWISE) for name, reason in NOT_QUANTIZED.items()),
    *(Refusal(ANY, ("none",), (name,), reason, QUANTIZE) for name, reason in QUANTIZED.items()),
    Refusal(
        ("fsdp",),
        ("int8",),
        ADAPTERS,
        "FSDP2 puts parameters of its own in the place of bitsandbytes' 8-bit ones, which hold the scales",
        "Use --quantization nf4, which FSDP2 shards, or --strategy.name ddp, zero1 or zero2.",
    ),
    Refusal(
        ("zero3",),
        ("int8",),
        ADAPTERS,
        "bitsandbytes holds 8-bit weights beside the parameter, so that every process would keep them whole",
        "Use --quantization nf4, which ZeRO-3 partitions, or --strategy.name zero2.",
    ),
    Refusal(
        ("zero3",),
        FOUR_BITS,
        ("dora",),
        "on CPU ranks PEFT's DoRA puts a copy in the place of a quantized weight, which ZeRO-3 does not know",
        "Use --adapter.name lora or rslora, or --strategy.name fsdp or zero2.",
    ),
    Refusal(
        ANY,
        tuple(name for name in LOW if not name.startswith("nf4")),
        ("loftq",),
        "no test covers LoftQ on such a base",
        "Use --quantization nf4 or nf4-double, or --adapter.name lora.",
    ),
    Refusal(ANY, LOW, PROMPTS, "no test covers virtual tokens on low-bit weights", "Use lora, or drop --quantization."),
    Refusal(
        ("diloco",),
        LOW,
        ADAPTERS,
        "no test covers low-bit weights under DiLoCo",
        "Use another strategy, or drop --quantization.",
    ),
)
"""The first that names a cell speaks for it."""


def support(strategy: str, quantization: str, adapter: str) -> Cell:
    """The cell of the table."""
    named = (
        refusal
        for refusal in REFUSALS
        if strategy in refusal.strategies and quantization in refusal.quantizations and adapter in refusal.adapters
    )
    return Cell(strategy, quantization, adapter, next(named, None))


MATRIX = tuple(support(*names) for names in itertools.product(STRATEGIES, QUANTIZATIONS, ADAPTERS))
"""All cells, strategy by strategy."""


def choose_low_bit(strategy: Strategy, quantization: str, adapter: str) -> LowBit:
    """How the frozen base of a run is to be held, before anything is loaded.

    Raises:
        ConfigError: the three do not go together, with the reason and the remedy.
    """
    cell = support(strategy.name, quantization, adapter)
    if cell.refusal:
        raise ConfigError(
            f"--quantization {quantization} with --strategy.name {strategy.name} and --adapter.name {adapter} is "
            f"refused: {cell.refusal.reason}",
            cell.refusal.remedy,
        )
    # What FSDP2 gathers it casts to the precision of the run, and bytes must not be cast: they are packed into numbers
    # that are of that type already.
    storage = strategy.precision.dtype if strategy.name == "fsdp" else torch.uint8
    return LowBit(quantization, storage, strategy.world.device)
