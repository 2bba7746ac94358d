"""`toolkit doctor` on this machine alone, with what it looks for provoked; and mistakes in its command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.nodes import DOCTOR, ROOT
from tests.faults.saving import SmallDisk, can_mount, leave_free
from tests.unit.test_cli import flat
from toolkit.cli import main

RECIPE = """
from dataclasses import dataclass
from toolkit.config import CheckpointConfig, ModelConfig, RunConfig, StrategyConfig

@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig(name="nobody/no-such-model")
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

def main(config):
    pass
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if not can_mount():
        pytest.skip("neither root nor a user namespace may mount a tmpfs here")
    disk = SmallDisk(tmp_path / "disk", "4m")
    yield disk
    disk.close()


def doctor(*words: object, code: int, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [*DOCTOR, "--json", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def found(said: dict[str, Any], check: str) -> list[tuple[str, str]]:
    return [(f["severity"], f["what"]) for f in said["findings"] if f["check"] == check]


def test_port_disk_and_hub(disk: SmallDisk, tmp_path: Path) -> None:
    """A port that this process has, a disk without a page, a hub that nobody answers for."""
    leave_free(disk.path, 0)
    (tmp_path / "recipe.py").write_text(RECIPE)
    with socket.create_server(("", 0)) as taken, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        endpoint, port = f"http://127.0.0.1:{nobody.getsockname()[1]}", taken.getsockname()[1]
        hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "", "HF_HOME": str(tmp_path)}
        # As a scheduler's script says it, also of one node.
        meeting = ["--nodes", "1", "--rank", "0", "--rendezvous", f"localhost:{port}"]
        said = doctor(tmp_path / "recipe.py", *meeting, "--", "--run.dir", disk.path / "run", code=1, **hub)
    assert said["seconds"] < 60
    assert found(said, "port")[0][0] == "error"
    assert f"{port} is taken by " in found(said, "port")[0][1]
    assert f"(process {os.getpid()})" in found(said, "port")[0][1]
    assert found(said, "disk")[0] == ("error", f"run folder {disk.path}/run: the disk is full, 0 MiB free")
    ((severity, what),) = found(said, "hub")
    assert severity == "error"
    assert what.startswith(f"{endpoint} does not answer (")
    assert what.endswith("and the settings name nobody/no-such-model")
    assert {f["check"] for f in said["findings"] if f["severity"] == "error"} == {"port", "disk", "hub"}
    assert all(f["why"] and f["mend"] for f in said["findings"] if f["severity"] == "error")
    assert said["figures"]["gloo"]["0-1"]["bandwidth"] > 0, "two processes of this machine meet"


def test_a_mistake_in_the_settings_is_told_as_the_recipe_would(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)
    said = doctor("--", tmp_path / "recipe.py", "--run.nme", "x", code=1, HF_HUB_OFFLINE="1")
    ((severity, what),) = found(said, "recipe")
    assert severity == "error"
    assert "--run.nme" in what


@pytest.mark.slow
def test_a_real_recipe_whose_data_are_not_prepared(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"word{i} here,{i % 2}\n" for i in range(60)))
    words = ["--data.name", tmp_path / "texts.csv", "--strategy.name", "fsdp"]
    said = doctor("recipes/bert_cls.py", "--timeout", "200", "--", *words, code=0)
    assert found(said, "data") == [("ok", "not prepared yet: the run will begin by that")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "there is no recipe nowhere.py"),
        (["--", "nowhere.py", "--run.dir", "x"], "there is no recipe nowhere.py"),
        (["--jsn"], "unrecognized arguments: --jsn. Did you mean '--json'?"),
        (["--nodes", "2"], "several nodes need --rank and --rendezvous"),
        (["--nodes", "2", "--rank", "2", "--rendezvous", "a:1"], "--rank 2 is not below --nodes 2"),
        (["--nodes", "2", "--rank", "0", "--rendezvous", "a"], "--rendezvous a is not HOST:PORT"),
        (["--nodes", "2", "--rank", "0", "--rendezvous", "a:70000"], "is not HOST:PORT"),
        (["--nodes", "0"], "'0' is not a whole number from 1 on"),
        (["--rank", "1"], "--rank 1 is not below --nodes 1"),
        (["--timeout", "5"], "'5' is not a number from 10 to 3600"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in flat(err)
