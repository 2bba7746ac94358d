"""Memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held: allocated by torch on a GPU, resident (code and libraries too) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def give_back_freed() -> None:
    """Give the system what has been freed: glibc keeps it, as much as a step needs or more, and lays steps beside it.

    Takes up to some tenths of a second; where there is another C library it does nothing.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
