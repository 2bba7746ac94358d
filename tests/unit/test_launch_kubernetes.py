"""The manifest for Kubernetes: what it starts can be started, and what it says in two places agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.__main__ import main
from launch.local import divide
from launch.processes import MARGIN
from recipes.sft import Config
from toolkit.config import parse

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "launch" / "templates" / "pytorchjob.yaml"


@pytest.fixture
def job() -> Any:
    return yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))


def option(words: list[str], name: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found


def test_the_command_starts_with_what_the_operator_sets(
    job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    specs = job["spec"]["pytorchReplicaSpecs"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    (container,) = specs["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["command"] == ["python", "-m", "launch", "local"]
    words, recipe_words = divide(container["args"])
    pods = sum(spec["replicas"] for spec in specs.values())
    for pod in range(pods):
        own = [word.replace("$(RANK)", str(pod)) for word in words]
        assert main(["local", *own, "--dry-run", "--", *recipe_words]) == 0
        assert f"--machine_rank {pod} " in capsys.readouterr().err
    assert option(words, "nodes") == str(pods)
    assert option(words, "processes") == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert option(words, "address") == f"{job['metadata']['name']}-master-0"
    settings = parse(Config, recipe_words, quiet=True)
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(str(settings.run.dir).startswith(f"{path}/") for path in mounted)
    assert "/dev/shm" in mounted


def test_a_pod_that_is_taken_away_is_started_again(job: Any) -> None:
    """The operator starts a pod again after codes from 128 on; and a pod must live as long as its ranks save."""
    for spec in job["spec"]["pytorchReplicaSpecs"].values():
        assert spec["restartPolicy"] == "ExitCode"
        (container,) = spec["template"]["spec"]["containers"]
        words = container["args"]
        assert int(option(words, "resumable-code")) >= 128
        assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > float(option(words, "grace")) + MARGIN
