"""Tensors out of a folder that another tool has written, without running anything that lies in it.

The index of torch's distributed checkpoints (DCP), `.metadata`, is a pickle, and a pickle is a program. The one here is
only allowed to name the few classes that real ones hold, and gets stand-ins for them that can do nothing; what it built
is then read field by field. Objects beside the tensors are pickles, too: they are left alone.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from toolkit.errors import CheckpointError
from toolkit.folders import contained, refuse_strays

METADATA = ".metadata"

_SHARDING = "DCP_SHARDING_INFO"
_METADATA_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed._shard.sharded_tensor.metadata",  # where torch before 2.3 had the first two of these
)
_RECORDS = (
    *("TensorProperties", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING"),
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
    *("StorageMeta", "_StorageInfo"),
)


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor: where it begins, its shape, and how to read it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Blob:
    """Where something lies in a file of DCP."""

    path: Path
    offset: int
    length: int


class _Record:
    """Stands for an object of the index; holds what it was made from."""

    def __init__(self, *values: Any) -> None:
        self.state: Any = values

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Refused(Exception):
    """The index names what it has no business with."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        # New ones each time: even a class could be given attributes by a pickle.
        self._records = {name: type(name, (_Record,), {}) for name in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if module in _METADATA_MODULES and name in self._records:
            return self._records[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("torch.serialization", "_get_layout") or module in ("pathlib", "pathlib._local"):
            return type(name, (_Record,), {})
        raise _Refused(f"{module}.{name}")


def read_foreign(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All tensors in a folder of DCP or of safetensors, whole; and the names of what is no tensor and was left alone.

    Raises:
        CheckpointError: it is neither, is damaged, lacks a part, or would run code or lead out of the folder.
    """
    if (folder / METADATA).exists() or (folder / METADATA).is_symlink():
        return _read_dcp(folder)
    if any(folder.glob("*.safetensors")):
        return _read_safetensors(folder), []
    raise CheckpointError(
        f"{folder} holds neither {METADATA} (of torch's distributed checkpoints) nor safetensors",
        "Name the folder that does.",
    )


def _read_dcp(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    path = contained(folder, METADATA)
    try:
        root = _Unpickler(path.read_bytes()).load()
        entries: Mapping[str, Any] = root.field("state_dict_metadata")
        blobs = {
            (str(index.field("fqn")), _whole_numbers(index.field("offset") or ())): _blob(folder, info)
            for index, info in root.field("storage_data").items()
        }
        plans = {
            str(name): _plan(str(name), entry, blobs)
            for name, entry in entries.items()
            if type(entry).__name__ != "BytesStorageMetadata"
        }
    except CheckpointError:
        raise
    except _Refused as refused:
        raise CheckpointError(
            f"{path} names {refused}, which no index of DCP needs: it may be meant to run code. Nothing of it was run",
            "Do not use this folder unless you know who made it; convert it with the tool that wrote it.",
        ) from None
    except Exception as error:  # a pickle can fail in any way
        raise _damaged(path, error) from error
    return {name: _assembled(folder, name, *plan) for name, plan in plans.items()}, sorted(
        str(name) for name in entries.keys() - plans.keys()
    )


def _blob(folder: Path, info: Any) -> _Blob:
    if info.field("transform_descriptors"):
        raise CheckpointError(f"{folder} is compressed", "Save it again without extensions of DCP.")
    path = contained(folder, info.field("relative_path"))
    offset, length = _whole_numbers((info.field("offset"), info.field("length")))
    if offset + length > path.stat().st_size:
        raise CheckpointError(f"{path} is shorter than {METADATA} says", "Copy the folder again.")
    return _Blob(path, offset, length)


def _plan(
    name: str, entry: Any, blobs: Mapping[tuple[str, tuple[int, ...]], _Blob]
) -> tuple[torch.dtype, tuple[int, ...], list[_Chunk]]:
    properties, shape = entry.field("properties").state, _whole_numbers(entry.field("size"))
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} has no type")
    chunks, stored = [], 0
    for chunk in entry.field("chunks"):
        offsets, sizes = _whole_numbers(chunk.field("offsets")), _whole_numbers(chunk.field("sizes"))
        blob = blobs[name, offsets] if (name, offsets) in blobs else blobs[name, ()]
        stored += blob.length
        chunks.append(_Chunk(offsets, sizes, partial(_load, blob)))
    if math.prod(shape) * dtype.itemsize > stored:
        raise ValueError(f"{name} is larger than what is stored of it")
    return dtype, shape, chunks


def _load(blob: _Blob) -> torch.Tensor:
    with blob.path.open("rb") as file:
        file.seek(blob.offset)
        content = io.BytesIO(file.read(blob.length))
    tensor: Any = torch.load(content, map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"a {type(tensor).__name__}, where a tensor was to be")
    return tensor


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    paths = [contained(folder, path.name) for path in sorted(folder.glob("*.safetensors"))]
    refuse_strays(folder)
    chunks: dict[str, tuple[torch.dtype, list[_Chunk]]] = {}
    for path in paths:
        try:
            for name, dtype, chunk in _chunks_of(path):
                chunks.setdefault(name, (dtype, []))[1].append(chunk)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
    return {name: _assembled(folder, name, dtype, None, found) for name, (dtype, found) in chunks.items()}


def _chunks_of(path: Path) -> Iterable[tuple[str, torch.dtype, _Chunk]]:
    with safe_open(path, framework="pt") as file:
        offsets = json.loads((file.metadata() or {}).get(_SHARDING, "{}"))
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            start = _whole_numbers(offsets[name]["saved_offsets"]) if offsets else (0,) * len(shape)
            yield name, file.get_tensor(name).dtype, _Chunk(start, shape, partial(_tensor_of, path, name))


def _tensor_of(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _extent(chunks: Iterable[_Chunk]) -> tuple[int, ...]:
    ends = [tuple(map(sum, zip(chunk.offsets, chunk.shape, strict=True))) for chunk in chunks]
    return tuple(map(max, zip(*ends, strict=True)))


def _assembled(
    folder: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None, chunks: list[_Chunk]
) -> torch.Tensor:
    """The chunks put together; they must cover the tensor, whose shape may be for them to say."""
    try:
        shape = _extent(chunks) if shape is None else shape
        distinct = {chunk.offsets for chunk in chunks}
        if len(distinct) != len(chunks) or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise ValueError("its parts do not make the whole of it")
        whole = torch.zeros(shape, dtype=dtype)
        for chunk in chunks:
            part = chunk.read()
            place = whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))]
            if part.shape != chunk.shape or part.dtype != dtype or place.shape != part.shape:
                raise ValueError("a part of it is not as the index says")
            place.copy_(part)
    except Exception as error:  # torch.load and safetensors have their own
        raise _damaged(folder, error, f"{name} in ") from error
    return whole


def _whole_numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TypeError(f"{numbers} are no sizes")
    return numbers


def _damaged(path: Path, error: Exception, what: str = "") -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(
        f"{what}{path} cannot be read: {type(error).__name__}: {lines[0][:200]}",
        "It is damaged, or of a kind that this version does not know. Nothing of it was run.",
    )
