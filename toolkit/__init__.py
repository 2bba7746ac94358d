"""A distributed training toolkit for large models: one recipe, the same numbers, from one CPU to many GPU nodes."""

import gc
import logging
import sys
from pathlib import Path
from typing import Any

GARBAGE_THRESHOLD = gc.get_threshold()
"""Python's own; a recipe goes back to it when all is imported."""

# What torch, transformers and datasets make when they are imported stays, and the garbage collector would look through
# it again and again: a quarter of the time that the imports take.
gc.set_threshold(20_000, 50, 100)

# Where torchao is installed transformers imports it, and it tells each process which of its libraries do not load.
for _talker in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_talker).setLevel(logging.ERROR)


class _ReadOnce:
    """A finder that finds nothing: it lets `transformers.models` go by, and shows it what has been read already.

    To know where each class is, transformers reads the source of all its models (1,700 files) when it is imported, and
    for this package of them a second time, because it keeps what it read of a folder by the folder's path and asks by
    a file's. That takes a third of a second, and far longer where the files lie on a file system of many nodes.
    """

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Called before a module is imported; None hands on to the next finder."""
        if name == "transformers.models":
            sys.meta_path.remove(cls)
            utils: Any = sys.modules.get("transformers.utils.import_utils")
            if read := getattr(utils, "create_import_structure_from_path", None):
                utils.create_import_structure_from_path = lambda path: read(_folder(Path(path)))


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


sys.meta_path.insert(0, _ReadOnce)
