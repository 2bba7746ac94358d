"""Names for what the code does, as a trace shows them; nothing where none is taken."""

from __future__ import annotations

import contextlib

import torch

PREFIX = "toolkit::"
_NOTHING = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """Around what a trace of this thread shows as `toolkit::NAME`."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return _NOTHING
    return torch.profiler.record_function(PREFIX + name)
