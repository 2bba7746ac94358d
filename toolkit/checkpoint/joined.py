"""The tensors of a checkpoint as they were before they were cut into ranges; and one digest of them all.

A checkpoint holds each tensor flattened, in as many ranges as ranks held it. Here the ranges are put together again,
tensor by tensor, and checked against the manifest: none may be missing, doubled, or of another type.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from toolkit.errors import CheckpointError
from toolkit.folders import contained

_SHARDING = "DCP_SHARDING_INFO"


class Joined:
    """The tensors of a checkpoint, to be read one at a time.

    Args:
        checkpoint: its folder.
        manifest: as `read_manifest` gives it.

    Attributes:
        names: of all tensors, sorted, as `weights/NAME`.

    Raises:
        CheckpointError: the files do not hold what the manifest says.
    """

    def __init__(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._tensors: Mapping[str, Any] = manifest["tensors"]
        self._files = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        try:
            for name in sorted(manifest["files"]):
                if name.endswith(".safetensors"):
                    self._enter(contained(checkpoint, name))
            self._check()
        except BaseException:
            self._files.close()
            raise
        self.names = sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._tensors[name]["shape"])

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The flattened tensor, range by range in order."""
        return (part.get_tensor(name) for _, _, part in self._pieces[name])

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in its shape, in memory of its own."""
        return torch.cat(list(self.pieces(name))).view(self.shape(name))

    def of_kind(self, kind: str) -> dict[str, torch.Tensor]:
        """The whole tensors `KIND/NAME`, by NAME."""
        return {name.partition("/")[2]: self.tensor(name) for name in self.names if name.partition("/")[0] == kind}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def _enter(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            offsets = json.loads(file.metadata()[_SHARDING])
            for name in file.keys():  # noqa: SIM118
                (start,), (length,) = offsets[name]["saved_offsets"], file.get_slice(name).get_shape()
                self._pieces.setdefault(name, []).append((int(start), length, file))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._unfit(
                f"{path.name} is not as the toolkit writes it ({type(error).__name__}: {error})"
            ) from error

    def _check(self) -> None:
        if strangers := sorted(self._pieces.keys() ^ self._tensors.keys()):
            raise self._unfit(f"manifest and files do not name the same tensors ({', '.join(strangers[:3])})")
        for name, pieces in self._pieces.items():
            if not (name.partition("/")[0].isidentifier() and name.partition("/")[2]):
                raise self._unfit(f"{name!r} is no name of a tensor")
            end = 0
            pieces.sort(key=lambda piece: piece[0])
            for start, length, file in pieces:
                dtype = str(file.get_slice(name)[:0].dtype).removeprefix("torch.")
                if start != end or dtype != self._tensors[name]["dtype"]:
                    raise self._unfit(f"of {name} there is a range at {start} of {dtype}, after one that ends at {end}")
                end += length
            if end != math.prod(self.shape(name)):
                raise self._unfit(f"of {name} there are {end} elements of {math.prod(self.shape(name))}")

    def _unfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint}: {why}", "Run `toolkit checkpoint verify` on it.")


def load_weights(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All weights and persistent buffers of a checkpoint, whole, by the plain model's names.

    Raises:
        CheckpointError: the files do not hold what the manifest says.
    """
    with Joined(checkpoint, manifest) as joined:
        return joined.of_kind("weights") | joined.of_kind("buffers")


def state_digest(checkpoint: Path, manifest: Mapping[str, Any]) -> str:
    """SHA-256 over name, type, shape and content of every tensor, whatever strategy, ranks and ranges wrote them.

    Raises:
        CheckpointError: the files do not hold what the manifest says.
    """
    digest = hashlib.sha256()
    with Joined(checkpoint, manifest) as joined:
        for name in joined.names:
            head = [name, manifest["tensors"][name]["dtype"], list(joined.shape(name))]
            digest.update((json.dumps(head) + "\n").encode())
            for piece in joined.pieces(name):
                digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
