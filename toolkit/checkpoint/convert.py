"""Training state as plain safetensors, whole tensors in their own shapes, for other tools to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from toolkit.checkpoint.foreign import read_foreign
from toolkit.checkpoint.joined import Joined
from toolkit.folders import written_aside

STATE = "state.json"
TENSORS = "tensors.safetensors"

_FACTS = (
    *("step", "epoch", "samples_seen", "created", "attempt", "metrics", "world", "scaler", "versions"),
    "data_fingerprint",
)


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        files: tensors in each file, by its name.
        left_out: names of what is no tensor, and was neither loaded nor written.
    """

    files: Mapping[str, int]
    left_out: tuple[str, ...] = ()


def convert(checkpoint: Path, manifest: Mapping[str, Any], target: Path) -> Converted:
    """Write one file for each kind of tensor (`weights`, `exp_avg`, …), each by the plain model's names.

    One kind at a time is in memory. `target` gets a `state.json` with the step, the metrics and the world.

    Raises:
        CheckpointError: the files do not hold what the manifest says.
    """
    files = {}
    with Joined(checkpoint, manifest) as joined, written_aside(target) as aside:
        for kind in sorted({name.partition("/")[0] for name in joined.names}):
            tensors = joined.of_kind(kind)
            save_file(tensors, aside / f"{kind}.safetensors", metadata={"format": "pt"})
            files[f"{kind}.safetensors"] = len(tensors)
        facts = {key: manifest[key] for key in _FACTS if key in manifest}
        _write_state(aside, facts | {"files": files})
    return Converted(files)


def convert_foreign(source: Path, target: Path) -> Converted:
    """Write the tensors of another tool's checkpoint to `tensors.safetensors`, by the names that they have there.

    Raises:
        CheckpointError: it cannot be read, or not without running code.
    """
    tensors, left_out = read_foreign(source)
    files = {TENSORS: len(tensors)}
    with written_aside(target) as aside:
        save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
        _write_state(aside, {"files": files, "left_out": left_out})
    return Converted(files, tuple(left_out))


def _write_state(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
