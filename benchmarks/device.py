"""The device that a benchmark runs on: which it is, what it can do, and how much of it was held."""

from __future__ import annotations

import os
import resource
import statistics
import time

import torch


def device() -> torch.device:
    """The GPU that recipes and the Trainer take by themselves, or the CPU."""
    refused = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.device("cuda" if torch.cuda.is_available() and not refused else "cpu")


def synchronize() -> None:
    """Wait for what was handed to a GPU, or its time would be counted as that of what comes next."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most that this process has held: allocated by torch on a GPU, resident on a CPU; as recipes report it."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_peak() -> float:
    """Operations a second of a large product in bf16."""
    place = device()
    size, at_once = (8192, 20) if place.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=place).bfloat16() for _ in range(2))
    times = []
    for _ in range(20):
        synchronize()
        began = time.perf_counter()
        for _ in range(at_once):
            left @ right
        synchronize()
        times.append((time.perf_counter() - began) / at_once)
    return 2 * size**3 / statistics.median(times)
