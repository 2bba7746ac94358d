"""Files for `accelerate launch`: those that are shipped are those that would be written, and nonsense is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.accelerate_config import STRATEGIES, Start, render
from tests.unit.launch_configs import SHIPPED

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_files() -> None:
    files = {file.stem: file.read_text(encoding="utf-8") for file in ROOT.glob("configs/accelerate/*.yaml")}
    assert files == {name: render(start) for name, start in SHIPPED.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_command_prints(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--processes", "4", "--cpu", "--strategy", strategy]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(strategy, "DEEPSPEED")
    assert (said["num_processes"], said["use_cpu"], said["distributed_type"]) == (4, True, kind)
    assert said.get("deepspeed_config", {}).get("zero_stage") == {"zero1": 1, "zero2": 2, "zero3": 3}.get(strategy)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ("--processes 3 --nodes 2 --address node1", "3 processes cannot be spread evenly over 2 nodes"),
        ("--processes 0", "0 processes"),
        ("--strategy zero3", "zero3 needs at least two processes"),
        ("--processes 4 --nodes 2", "the address of the first one"),
    ],
)
def test_what_cannot_start(options: str, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *options.split()]) == 2
    assert fact in capsys.readouterr().err


def test_several_nodes() -> None:
    said = yaml.safe_load(render(Start(4, "zero2", nodes=2, address="node1", port=1234)))
    assert (said["num_machines"], said["main_process_ip"], said["main_process_port"]) == (2, "node1", 1234)
    assert said["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


def test_the_table_of_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "launch", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "\n  config " in done.stdout
    assert "\n  run " in done.stdout
    unknown = subprocess.run([sys.executable, "-m", "launch", "rnu"], cwd=ROOT, capture_output=True, text=True)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "'config', 'local'" in unknown.stderr
