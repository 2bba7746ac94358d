"""DeepSpeed itself: its import, and the extensions that it compiles at their first use."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from toolkit.errors import ConfigError
from toolkit.samples import cache_folder


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which takes seconds to import, for the runs that use it."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it takes the GPU that it finds
    # DeepSpeed builds its extension with the ninja that PATH finds: this environment's, activated or not.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ["PATH"]))
    try:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
        with quiet():
            import deepspeed
            from torch.utils import cpp_extension
    except ImportError as error:
        raise ConfigError(f"ZeRO needs DeepSpeed: {error}", "pip install -c constraints.txt deepspeed") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    setattr(cpp_extension, "FileBaton", Baton)  # noqa: B010  # `load` looks it up; typed as not exported
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what is printed inside."""
    # DeepSpeed prints its build and import notes to stdout, in the middle of the recipe's tables.
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def extensions_folder() -> Path:
    """Where the extensions of this environment are compiled, for CPUs like this one.

    torch has one folder for all environments of a user. As each compiles with other paths, two of them would replace
    one another's files, at every start and for a minute; and what was compiled for one CPU of a cluster need not run on
    another that shares the folder.
    """
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    key = "\n".join([sys.prefix, *versions, torch.backends.cpu.get_cpu_capability()])
    return cache_folder() / "extensions" / hashlib.sha256(key.encode()).hexdigest()[:16]


class Baton:
    """Turns among the processes that compile one extension, as `torch.utils.file_baton.FileBaton`.

    torch's own is a file whose presence says that somebody compiles. One that was killed leaves it behind, and every
    later run waits for it without end and without a word. This one's lock is freed by the operating system.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        # Another name than torch's, for whom this file would be somebody who compiles.
        self._lock = FileLock(f"{lock_file_path}.held")

    def try_acquire(self) -> bool:
        """Wait for the turn. Whoever comes later finds the work done, or does it where a process was killed at it."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let the next one."""
        self._lock.release()
