"""What all saved models that answer have in common: where they compute, and how they come from the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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


def load_network(folder: Path) -> Any:
    """The network of the class that `config.json` names, in fp32: never from a hub, never a pickle.

    Raises:
        ModelError: the files are damaged, or lack weights.
    """
    try:
        refuse_strays(folder)
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        model, report = architecture(name).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # each of the libraries below has its own; the user is to hear which folder it is
        raise ModelError(
            f"the model in {folder} cannot be loaded: {first_line(error)}", "Copy it again, or train again."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the model in {folder} lacks {len(missing)} of its weights ({', '.join(missing[:3])} …)",
            "Copy it again, or train again.",
        )
    return model
