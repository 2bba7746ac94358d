"""Flat shards to files and back, by `torch.distributed.checkpoint` over safetensors.

Every tensor is stored flattened, in as many ranges as ranks held it. DCP plans who writes what (what several ranks hold
is written once, by the one with the least to write) and checks that the ranges cover each tensor. The files are
safetensors, whose headers say where a range begins: there is no pickle to be read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from toolkit.errors import CheckpointError
from toolkit.strategies.state import FlatShard


def write_tensors(
    folder: Path, shards: Mapping[str, FlatShard], group: dist.ProcessGroup | None
) -> dict[str, tuple[int, str]]:
    """Write the shards of all ranks into `folder`, flushed to the disk. Collective over `group`.

    Args:
        folder: made by rank 0 beforehand, or by the storage.
        shards: of this rank, in the memory of the CPU and apart from each other.
        group: of gloo; None for a process alone.

    Returns:
        For each file that this rank wrote, its size in bytes and its SHA-256.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    files = _HashingFileSystem()
    writer.fs = files
    state = {name: _Entry(name, shard) for name, shard in shards.items()}
    save(state, storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=group is None)
    return files.written


def read_tensors(folder: Path, shards: Mapping[str, FlatShard]) -> None:
    """Fill the shards of this rank from `folder`, whatever ranges it was written in. Not collective.

    Raises:
        CheckpointError: a tensor is missing there, of another size, or of another type.
    """
    reader = HuggingFaceStorageReader(str(folder))
    state = {name: _Entry(name, shard) for name, shard in shards.items()}
    try:
        load(state, storage_reader=reader, planner=_LoadPlanner(folder), no_dist=True)
    except CheckpointException as error:  # a BaseException, which wraps what happened
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(
            f"{folder} cannot be read: {type(cause).__name__}: {cause}", "Run `toolkit checkpoint verify` on it."
        ) from error


class _Entry:
    """A flat shard, as DCP asks for one."""

    def __init__(self, name: str, shard: FlatShard) -> None:
        self.name = name
        self.shard = shard
        self.chunk = ChunkStorageMetadata(torch.Size([shard.start]), torch.Size([shard.data.numel()]))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self.chunk,
            properties=TensorProperties.create_from_tensor(self.shard.data),
            size=torch.Size([self.shard.total]),
        )
        return [WriteItem(MetadataIndex(name, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.chunk]


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].shard.data


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.folder = folder

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default would put None in the place of what is no tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name, entry in self.state_dict.items():
            _check(self.folder, name, entry.shard, self.metadata.state_dict_metadata.get(name))
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        data: torch.Tensor = self.state_dict[index.fqn].shard.data
        return data


def _check(folder: Path, name: str, shard: FlatShard, stored: Any) -> None:
    if stored is None:
        raise CheckpointError(
            f"{folder} holds no {name}", "It was written for another model: start with the one of that run."
        )
    there, here = (stored.size.numel(), stored.properties.dtype), (shard.total, shard.data.dtype)
    if there != here:
        raise CheckpointError(
            f"{folder}: {name} has {there[0]} elements of {there[1]}, the model has {here[0]} of {here[1]}",
            "It was written for another model: start with the one of that run.",
        )


class _HashingFileSystem(FileSystem):
    """Files whose SHA-256 is known when they are closed, without reading them again."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = _HashingFile(stream)
            yield hashing
            self.written[Path(path).name] = hashing.size, hashing.digest.hexdigest()


class _HashingFile:
    """Hashes what is written while it is written: both let go of the interpreter's lock."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        self._hashing: threading.Thread | None = None

    def write(self, data: bytes) -> int:
        self._finish()
        self._hashing = threading.Thread(target=self.digest.update, args=(data,))
        self._hashing.start()
        self.size += len(data)
        self.stream.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        self.stream.flush()  # DCP asks for it to sync the file, and does not flush
        descriptor: int = self.stream.fileno()
        return descriptor

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self._finish()
        self.stream.flush()

    def _finish(self) -> None:
        if self._hashing is not None:
            self._hashing.join()
            self._hashing = None
