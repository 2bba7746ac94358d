"""A model that the ranks of one node read, or draw, once: the others map the memory of the first one to come.

Each rank would otherwise hold a whole copy until the model is laid over the ranks, and eight ranks of a node eight
times what the node can hold. The memory belongs to no file, so that nothing is left of it, however the ranks end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
import pickle
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from torch import nn

from toolkit.environment import Ranks, store_file
from toolkit.look import stop_looking

M = TypeVar("M", bound=nn.Module)

_ALIGNED = 64
"""Bytes: where each tensor begins, as torch's own allocator would have it."""
_CHUNK = 2**28
_held: list[int] = []
"""Descriptors of the memory that this process has made, which others may still have to map."""


def once_a_node(what: str, build: Callable[[], M]) -> M:
    """What `build` makes, made by one of the ranks of this node and mapped by the others, each of which may change it.

    A page is copied for a rank when that rank writes to it. Alone on its node, or where the system has no such memory,
    a rank builds its own.

    Args:
        what: says all that the result depends on.
        build: makes a model on the CPU; where it leaves torch's generator of random numbers, all ranks go on.
    """
    stop_looking()
    folder = _private_folder() if Ranks.read().local_size > 1 else None
    if folder is None:
        return build()
    key = hashlib.sha256("\0".join((Ranks.read().master, store_file(), what)).encode()).hexdigest()[:32]
    notice = folder / f"{key}.json"
    with FileLock(f"{notice}.lock"):
        memory = _offered(notice)
        if memory is None:
            model = build()
            memory = _move(model, key)
            if memory is None:
                return model
            _held.append(memory.descriptor)
            notice.write_text(json.dumps({"process": os.getpid()} | dataclasses.asdict(memory)), encoding="utf-8")
            return _mapped(memory)  # type: ignore[no-any-return]
        try:
            return _mapped(memory)  # type: ignore[no-any-return]
        finally:
            os.close(memory.descriptor)


def stop_offering() -> None:
    """All ranks have what they need: from now on the memory lives only where it is mapped."""
    while _held:
        os.close(_held.pop())


@dataclass(frozen=True)
class _Memory:
    """Memory that holds a model.

    Attributes:
        name: which no other memory has.
        descriptor: of this process.
        begin: byte at which the pickled model begins, behind its tensors.
    """

    name: str
    descriptor: int
    begin: int


class _Pickler(pickle.Pickler):
    """Leaves the tensors out, and lists them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self._places:  # a parameter that is tied to another is the same object
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)]


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back. What it reads was written by a process of this user, for this job."""

    def __init__(self, pickled: bytes, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._tensors = tensors

    def persistent_load(self, place: int) -> torch.Tensor:
        return self._tensors[place]


def _private_folder() -> Path | None:
    """Where the ranks of a node find one another's memory; None where they could not trust what is there."""
    if sys.platform != "linux":
        return None
    folder = Path(tempfile.gettempdir(), f"largemodel-toolkit-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder if private else None


def _offered(notice: Path) -> _Memory | None:
    """The memory that a living process offers; None where there is none, or only the note of one that has ended."""
    try:
        said = json.loads(notice.read_bytes())
        path = Path(f"/proc/{int(said['process'])}/fd/{int(said['descriptor'])}")
        if str(path.readlink()) != f"/memfd:{said['name']} (deleted)":
            return None
        return _Memory(said["name"], os.open(path, os.O_RDONLY), said["begin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _move(model: nn.Module, key: str) -> _Memory | None:
    """Move a model's tensors to new memory, one by one; None, and nothing moved, where that cannot be done."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(model)
    except (pickle.PicklingError, AttributeError, TypeError):  # a module with a function of its own
        return None
    tensors = pickler.tensors
    if not all(type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors):
        return None
    places, begin = [], 0
    for tensor in tensors:
        places.append(begin)
        begin += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    kinds = [(t.dtype, tuple(t.shape), isinstance(t, nn.Parameter), t.requires_grad) for t in tensors]
    rest = pickle.dumps((list(zip(places, kinds, strict=True)), torch.get_rng_state().numpy(), file.getvalue()))
    name = f"{key}-{secrets.token_hex(8)}"
    try:
        descriptor = os.memfd_create(name)
        os.posix_fallocate(descriptor, 0, begin + len(rest))
    except OSError:
        return None
    for place, tensor in zip(places, tensors, strict=True):
        _write(descriptor, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, place)
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    _write(descriptor, memoryview(rest), begin)
    return _Memory(name, descriptor, begin)


def _write(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _CHUNK], place + done)


def _mapped(memory: _Memory) -> Any:
    """The model, on pages that are this process's own as soon as it writes to them."""
    pages = mmap.mmap(memory.descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    table, generator, pickled = pickle.loads(memoryview(pages)[memory.begin :])
    torch.set_rng_state(torch.from_numpy(generator))
    tensors = []
    for place, (dtype, shape, parameter, trained) in table:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel() and parameter:
            tensor = torch.frombuffer(pages, dtype=dtype, count=tensor.numel(), offset=place).view(shape)
        elif tensor.numel():  # a buffer, which would hold on to the pages when all parameters have left them
            tensor.copy_(torch.frombuffer(pages, dtype=dtype, count=tensor.numel(), offset=place).view(shape))
        tensors.append(nn.Parameter(tensor, requires_grad=trained) if parameter else tensor)
    return _Unpickler(pickled, tensors).load()
