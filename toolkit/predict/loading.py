"""What all saved models that answer have in common: where they compute, and how they come from the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from toolkit.adapters import FILE, in_place, load_adapted
from toolkit.errors import ConfigError, ModelError
from toolkit.folders import refuse_strays
from toolkit.networks import architecture
from toolkit.predict.saved import first_line


def choose_device(wish: str) -> str:
    """`cpu` or `cuda`; `auto` takes the GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    gpu = torch.cuda.is_available()
    if wish == "cuda" and not gpu:
        raise ConfigError("--device cuda: there is no GPU that torch could use here", "Use --device cpu.")
    return "cuda" if gpu and wish != "cpu" else "cpu"


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """In which the model in a folder is loaded.

    Raises:
        ModelError: what goes wrong there: each library has errors of its own; the user is to hear which folder it is.
    """
    try:
        refuse_strays(folder)
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model in {folder} cannot be loaded: {first_line(error)}", "Copy it again, or train again."
        ) from error


def load_saved(folder: Path, head: Any, reader: Any = transformers.AutoTokenizer) -> tuple[Any, Any]:
    """The model in a folder, in fp32 on the CPU, and what prepares its inputs; an adapter stands on its base.

    Never from a hub, never with code of its own, never a pickle.

    Args:
        folder: of the model.
        head: class of transformers that loads it.
        reader: class that loads its tokenizer or processor.

    Raises:
        ModelError: the files are damaged, lack weights, or hold another kind of model.
    """
    with loading(folder):
        inputs = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (folder / FILE).is_file():  # an adapter, whose base comes from where the run had it from
            return in_place(load_adapted(folder)), inputs
        return _whole(folder, head), inputs


def load_network(folder: Path) -> Any:
    """The network of the class that `config.json` names, in fp32 on the CPU, where nothing else is read of its folder.

    Raises:
        ModelError: the files are damaged, or lack weights.
    """
    with loading(folder):
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        return _whole(folder, architecture(name))


def _whole(folder: Path, head: Any) -> Any:
    model, report = head.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the model in {folder} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …)",
            "Copy it again, or train again.",
        )
    return model
