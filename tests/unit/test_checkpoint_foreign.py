"""Folders of other tools: what is read out of them, and that nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import on_ranks
from tests.unit.checkpoint_runs import write_run
from toolkit.checkpoint.foreign import read_foreign
from toolkit.checkpoint.manifest import read_manifest
from toolkit.cli import main
from toolkit.errors import CheckpointError
from toolkit.world import world

Toolkit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def toolkit(capsys: pytest.CaptureFixture[str]) -> Toolkit:
    """Run `toolkit checkpoint …` in this process; exit code, standard output, and standard error on one line."""

    def run_command(*words: object) -> tuple[int, str, str]:
        code = main(["checkpoint", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in err.splitlines()).split())

    return run_command


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def save_dcp(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def save_sharded(folder: Path) -> None:
    """Rows and columns over 2 ranks, and one whole."""
    w = world()
    w.connect()
    mesh = init_device_mesh("cpu", (w.size,))
    rows = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
    columns = distribute_tensor(torch.arange(14).view(2, 7), mesh, [Shard(1)])
    dcp.save({"rows": rows, "columns": columns, "whole": torch.ones(3, dtype=torch.bfloat16)}, checkpoint_id=folder)
    dist.barrier()
    w.close()


def test_a_folder_of_dcp(tmp_path: Path, toolkit: Toolkit) -> None:
    state = {
        "model": {"a.weight": torch.randn(3, 4), "b": torch.tensor(7), "c": torch.randn(2, 3, 4).bfloat16()},
        "optim": {"state": {"a.weight": {"exp_avg": torch.randn(3, 4), "step": torch.tensor(5.0)}}, "lr": 0.5},
        "flags": torch.tensor([True, False]),
        "note": "a text",
    }
    code, out, err = toolkit("convert", save_dcp(tmp_path / "dcp", state), tmp_path / "plain", "--foreign")
    assert (code, out) == (0, f"{tmp_path / 'plain'}\n")
    found = load_file(tmp_path / "plain" / "tensors.safetensors")
    expected: dict[str, Any] = {
        "model.a.weight": state["model"]["a.weight"],
        "model.b": state["model"]["b"],
        "model.c": state["model"]["c"],
        "optim.state.a.weight.exp_avg": state["optim"]["state"]["a.weight"]["exp_avg"],
        "optim.state.a.weight.step": state["optim"]["state"]["a.weight"]["step"],
        "flags": state["flags"],
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    left = json.loads((tmp_path / "plain" / "state.json").read_text())["left_out"]
    assert left == ["note", "optim.lr"]
    assert "warning: note is no tensor but a pickle: it was neither loaded nor written" in err


def test_a_folder_of_dcp_from_two_ranks(tmp_path: Path) -> None:
    on_ranks(save_sharded, 2, tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == 2
    found, left_out = read_foreign(tmp_path)
    assert left_out == []
    assert torch.equal(found["rows"], torch.arange(15.0).view(5, 3))
    assert torch.equal(found["columns"], torch.arange(14).view(2, 7))
    assert torch.equal(found["whole"], torch.ones(3, dtype=torch.bfloat16))


def in_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def deep_in_index(folder: Path, payload: Payload) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"x": [payload]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_place_of_a_tensor(folder: Path, payload: Payload) -> None:
    """Padded to the length that the index says."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(iter(metadata.storage_data.values()))
    file = folder / info.relative_path
    content = bytearray(file.read_bytes())
    evil = pickle.dumps(payload, protocol=2)
    content[info.offset : info.offset + len(evil)] = evil
    file.write_bytes(content)


@pytest.mark.parametrize("place", [in_index, deep_in_index, in_place_of_a_tensor])
def test_a_payload_is_not_run(tmp_path: Path, toolkit: Toolkit, place: Callable[[Path, Payload], None]) -> None:
    marker, folder = tmp_path / "marker", save_dcp(tmp_path / "dcp", {"a": torch.randn(300)})
    pickle.loads(pickle.dumps(Payload(marker)))
    marker.rmdir()  # it works
    place(folder, Payload(marker))
    code, out, err = toolkit("convert", folder, tmp_path / "plain", "--foreign")
    assert (code, out) == (2, "")
    assert ("posix.mkdir, which no index of DCP needs" if "index" in place.__name__ else "a in") in err
    assert "Nothing of it was run" in err
    assert not marker.exists()
    assert not (tmp_path / "plain").exists()


def test_a_payload_among_the_objects_is_left_alone(tmp_path: Path, toolkit: Toolkit) -> None:
    """DCP's own reader unpickles what is no tensor."""
    marker = tmp_path / "marker"
    folder = save_dcp(tmp_path / "dcp", {"a": torch.ones(3), "evil": Payload(marker)})
    assert isinstance(
        pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata["evil"], BytesStorageMetadata
    )
    code, _, err = toolkit("convert", folder, tmp_path / "plain", "--foreign")
    assert code == 0
    assert "warning: evil is no tensor" in err
    assert load_file(tmp_path / "plain" / "tensors.safetensors").keys() == {"a"}
    assert not marker.exists()
    with warnings.catch_warnings(), pytest.raises(BaseException):  # noqa: B017, PT011, PT012
        warnings.simplefilter("ignore")
        dcp.load({"a": torch.ones(3), "evil": Payload(marker)}, checkpoint_id=folder, no_dist=True)
        raise RuntimeError
    assert marker.exists()  # by DCP's


@pytest.mark.parametrize(
    "names",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"ctorch.distributed.checkpoint.filesystem\npickle.loads\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"cbuiltins\ngetattr\n.",
    ],
)
def test_names_that_no_index_needs(tmp_path: Path, names: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(names)
    with pytest.raises(CheckpointError, match="which no index of DCP needs"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({}), pickle.dumps([1]), b"\x80\x04K\x01.", b"."])
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_foreign(tmp_path)


def test_an_index_cannot_change_a_class(tmp_path: Path) -> None:
    """A pickle may set attributes of what it names."""
    index = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x05\x00\x00\x00ownedK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(index)
    with pytest.raises(CheckpointError):
        read_foreign(tmp_path)
    assert not hasattr(Metadata, "owned")


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/etc/hostname", "..", "", "a/../__0_0.distcp", 7, "link.distcp"]
)
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = save_dcp(tmp_path / "dcp", {"a": torch.ones(3)})
    shutil.copy(folder / "__0_0.distcp", tmp_path / "outside.distcp")
    (folder / "link.distcp").symlink_to(tmp_path / "outside.distcp")
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="no name of a file in it|a symbolic link"):
        read_foreign(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    """Of the size of a tensor, or of the files."""
    folder = save_dcp(tmp_path / "dcp", {"a": torch.ones(4)})
    original = (folder / ".metadata").read_bytes()

    def lie(change: Callable[[Metadata], None], message: str) -> None:
        metadata: Metadata = pickle.loads(original)
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=message):
            read_foreign(folder)

    def of(metadata: Metadata) -> Any:
        return metadata.state_dict_metadata["a"]

    huge = torch.Size([1 << 50])
    lie(lambda m: setattr(of(m), "size", huge), "larger than what is stored of it")
    lie(lambda m: setattr(of(m).chunks[0], "sizes", torch.Size([2])), "do not make the whole")
    half = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    lie(lambda m: setattr(of(m), "chunks", [half, half]), "do not make the whole")
    lie(lambda m: setattr(of(m).chunks[0], "offsets", torch.Size([1])), "cannot be read: KeyError")
    lie(lambda m: setattr(of(m), "size", (-4,)), "are no sizes")
    lie(lambda m: setattr(of(m), "size", torch.Size([4, 1])), "cannot be read")
    lie(lambda m: setattr(of(m).properties, "dtype", torch.int32), "is not as the index says")
    lie(lambda m: setattr(next(iter(m.storage_data.values())), "length", 1 << 40), "shorter than .metadata says")
    lie(lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["zstd"]), "compressed")
    (folder / "__0_0.distcp").unlink()
    lie(lambda m: None, "No such file")


def sharded_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(1.5)}
    folder.mkdir()
    for number, name in enumerate(tensors, start=1):
        save_file({name: tensors[name]}, folder / f"model-0000{number}-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(tensors, start=1)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_a_folder_of_safetensors(tmp_path: Path, toolkit: Toolkit) -> None:
    expected = sharded_model(tmp_path / "model")
    code, _, err = toolkit("convert", tmp_path / "model", tmp_path / "plain", "--foreign")
    assert (code, err.startswith("tensors.safetensors: 2 tensors")) == (0, True)
    found = load_file(tmp_path / "plain" / "tensors.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_ranges_of_two_ranks(tmp_path: Path) -> None:
    """As DCP marks them in safetensors."""
    on_ranks(write_run, 2, tmp_path / "run", "fsdp", "classifier", (30,))
    checkpoint = tmp_path / "run/checkpoints/step_00000030"
    (tmp_path / "ranges").mkdir()
    for path in checkpoint.glob("*.safetensors"):
        shutil.copy(path, tmp_path / "ranges")
    found, _ = read_foreign(tmp_path / "ranges")
    shapes = read_manifest(checkpoint)["tensors"]
    assert {name: tensor.numel() for name, tensor in found.items()} == {
        name: torch.Size(facts["shape"]).numel() for name, facts in shapes.items()
    }
    (tmp_path / "ranges" / "shard_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="do not make the whole"):
        read_foreign(tmp_path / "ranges")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "missing.safetensors"])
def test_an_index_of_safetensors_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    sharded_model(tmp_path / "model")
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no name of a file in it|No such file"):
        read_foreign(tmp_path / "model")


def test_safetensors_that_are_none(tmp_path: Path) -> None:
    sharded_model(tmp_path / "model")
    first = tmp_path / "model" / "model-00001-of-00002.safetensors"
    shutil.copy(first, tmp_path / "model" / "model-00003-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="do not make the whole"):
        read_foreign(tmp_path / "model")
    (tmp_path / "model" / "model-00003-of-00002.safetensors").write_bytes(first.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_foreign(tmp_path / "model")
    (tmp_path / "model" / "model-00003-of-00002.safetensors").unlink()
    (tmp_path / "model" / "model-00003-of-00002.safetensors").symlink_to(first)
    with pytest.raises(CheckpointError, match="a symbolic link"):
        read_foreign(tmp_path / "model")
