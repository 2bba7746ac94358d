"""WIP."""
from __future__ import annotations
import torch
from toolkit.quantization import LowBit
from toolkit.strategies.base import Strategy

def low_bit(strategy: Strategy, quantization: str) -> LowBit:
    packed = strategy.precision.dtype if strategy.name == "fsdp" else torch.uint8
    return LowBit(quantization, strategy.precision.dtype, packed, strategy.world.device)
