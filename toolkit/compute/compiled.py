"""Blocks that torch compiles: fewer and larger kernels between the matrix products, for a warm-up."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from toolkit.compute.attention import attend
from toolkit.compute.dropout import QuickDropout
from toolkit.compute.padding_free import IMPLEMENTATION
from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks

COMPILERS = ("c++", "g++", "clang++")


def compile_blocks(model: nn.Module, device: torch.device) -> int:
    """Let torch compile each of the model's repeated blocks when it is first computed; returns how many there are.

    Block by block, because alike blocks are compiled once; and for rows of any length, so that a new length compiles
    nothing anew. Attention without padding and quick dropout stay as they are: they do not look the same twice.

    Raises:
        ConfigError: the model has no repeated blocks, or kernels for the CPU cannot be built here.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError("--train.compile has no effect on this model: it has no repeated blocks", "Drop it.")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise ConfigError(
            "--train.compile needs a C++ compiler on a CPU, and there is none in the PATH",
            "Install one (Debian: apt install g++), name it in CXX, or drop --train.compile.",
        )
    plain: Any = torch.compiler.disable
    AttentionInterface.register(IMPLEMENTATION, plain(attend))
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, QuickDropout):
                layer.forward = plain(layer.forward)  # type: ignore[method-assign]
        # Not the module, whose hooks would be compiled with it.
        block.forward = torch.compile(block.forward, dynamic=True)
    return len(blocks)


def compile_seconds() -> float:
    """Spent so far by this process on compiling."""
    from torch._dynamo.utils import calculate_time_spent

    spent: dict[str, Any] = calculate_time_spent()
    return float(spent.get("total_wall_time", 0.0))
