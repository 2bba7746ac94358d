"""Questions about processes that may end at any moment, even between two questions."""

from __future__ import annotations

import psutil


def alive(process: psutil.Process | int) -> bool:
    """Whether it runs; what has ended and waits for its parent does not."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
