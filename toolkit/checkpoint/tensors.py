"""Flat shards to files and back, by `torch.distributed.checkpoint` over safetensors.

Every tensor is stored flattened, in as many ranges as ranks held it. DCP plans who writes what (what several ranks hold
is written once, by the one with the least to write) and checks that the ranges cover each tensor. The files are
safetensors, whose headers say where a range begins: there is no pickle to be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType

from toolkit.checkpoint.manifest import write_file
from toolkit.errors import CheckpointError
from toolkit.strategies.state import FlatShard

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Their names in safetensors."""


def own_share(shards: Mapping[str, FlatShard], group: dist.ProcessGroup | None) -> list[str]:
    """The shards that this rank is to write; the same at every save. Collective over `group`.

    What several ranks hold falls to the one with the least to write.

    Raises:
        ValueError: the ranges of all ranks do not make up the tensors; raised on all ranks.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: _Entry(shard) for name, shard in shards.items()}, is_coordinator=True)
    plans: list[Any] = [planner.create_local_plan()]
    if group is not None:
        own, plans = plans[0], [None] * dist.get_world_size(group)
        dist.all_gather_object(plans, own, group=group)
    shared, _ = planner.create_global_plan(plans)  # alike on all ranks
    rank = 0 if group is None else dist.get_rank(group)
    return [item.index.fqn for item in shared[rank].items]


def write_tensors(folder: Path, shards: Mapping[str, FlatShard], rank: int) -> dict[str, tuple[int, str]]:
    """Write what is this rank's share into `folder`, flushed to the disk. Not collective.

    They are written from where they lie: safetensors' own `save` copies the whole file twice, and training would stand
    still, because it holds the interpreter's lock while it does.

    Args:
        folder: all ranks write to the same. One that another start has taken away meanwhile is not made again.
        shards: in the memory of the CPU and apart from each other; of what several ranks hold, see `own_share`.
        rank: names the file.

    Returns:
        For each file that this rank wrote, its size in bytes and its SHA-256.
    """
    if not shards:
        return {}
    path = folder / f"shard_{rank + 1:05d}.safetensors"
    return {path.name: write_file(path, *_safetensors(shards))}


def read_tensors(folder: Path, shards: Mapping[str, FlatShard]) -> None:
    """Fill the shards of this rank from `folder`, whatever ranges it was written in. Not collective.

    Raises:
        CheckpointError: a tensor is missing there, of another size, or of another type.
    """
    reader, planner = HuggingFaceStorageReader(str(folder)), _LoadPlanner(folder)
    state = {name: _Entry(shard) for name, shard in shards.items()}
    try:
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner.set_up_planner(state, metadata, is_coordinator=True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} cannot be read: {type(error).__name__}: {error}", "Run `toolkit checkpoint verify` on it."
        ) from error


class _Entry:
    """A flat shard, as DCP asks for one."""

    def __init__(self, shard: FlatShard) -> None:
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
    covered = sum(chunk.sizes.numel() for chunk in stored.chunks)
    if covered != shard.total:
        raise CheckpointError(
            f"{folder} holds {covered} of the {shard.total} elements of {name}",
            "Run `toolkit checkpoint verify` on it.",
        )


def _safetensors(shards: Mapping[str, FlatShard]) -> list[bytes | memoryview]:
    """The parts of a file in safetensors' format: length of the header, header, tensors without a gap."""
    # Wide types first, so that every tensor begins at a multiple of its width.
    ordered = sorted(shards.items(), key=lambda entry: -entry[1].data.element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, shard in ordered:
        begin, end = end, end + shard.data.nbytes
        header[name] = {
            "dtype": _DTYPES[shard.data.dtype],
            "shape": [shard.data.numel()],
            "data_offsets": [begin, end],
        }
    offsets = json.dumps({name: {"saved_offsets": [shard.start]} for name, shard in ordered})
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": offsets}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    tensors = [shard.data.view(torch.uint8).numpy().data for _, shard in ordered]
    return [len(content).to_bytes(8, "little"), content, *tensors]
