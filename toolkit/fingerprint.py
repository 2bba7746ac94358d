"""What this process is made of: its code and the packages under it, to be held against those of other processes."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "datasets", "safetensors", "numpy"),
    *("peft", "bitsandbytes"),
)
"""Those whose version decides what a run computes."""


def package_versions() -> dict[str, str]:
    """Of Python and of `PACKAGES`, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_files(more: Iterable[Path] = ()) -> dict[str, str]:
    """64 bits (hex) of the content of each file of code: of this package, of the recipes beside it, and `more`."""
    root = Path(__file__).parent.parent
    files = {
        str(path.relative_to(root)): path
        for folder in ("toolkit", "recipes")
        for path in root.glob(f"{folder}/**/*.py")
    }
    files |= {str(path): path for path in more if path.is_file() and path.resolve() not in files.values()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sorted(files.items())}
