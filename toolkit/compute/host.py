"""From the host to an accelerator and back, without one waiting for the other.

What only the host needs to know of a batch (where its texts end, how many labels count) it knew before the batch was
moved. So a tensor that is moved here remembers what it was copied from.
"""

from __future__ import annotations

import torch


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`; the copy is queued, and `on_host` finds the way back."""
    if device.type == "cpu":
        return tensor
    moved = pinned(tensor).to(device, non_blocking=True)
    moved.on_host = tensor  # type: ignore[attr-defined]
    return moved


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU: where `on_device` moved it what it was copied from, else a copy, which is waited for."""
    known: torch.Tensor | None = getattr(tensor, "on_host", None)
    return tensor.cpu() if known is None else known


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory, from which a copy to an accelerator need not be waited for."""
    return tensor if tensor.is_pinned() or not torch.cuda.is_available() else tensor.pin_memory()
