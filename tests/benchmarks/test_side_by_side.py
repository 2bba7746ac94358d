"""The benchmarks run, at a tiny size, and say what they are to say. Their figures are none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.side_by_side import summary
from tests.recipes.launching import ROOT, environment

NO_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (the extra bench)")
COMMANDS = [
    ["bert_cls_vs_trainer.py", "--rows", "32", "--peer", "loop", "--lengths", "uniform"],  # others take minutes
    ["predict_vs_pipeline.py", "--rows", "32"],
    ["predict_vs_pipeline.py", "--rows", "32", "--peer", "trainer"],
    ["start_vs_trainer.py", "--rows", "32"],
    ["step_by_network.py", "--network", "vit"],
    ["pretrain_lm_vs_trainer.py", "--global-batch", "2", "--steps", "8"],
    pytest.param(["sft_vs_trl.py", "--rows", "1", "--global-batch", "1"], marks=NO_TRL),
    pytest.param(["sft_vs_trl.py", "--rows", "1", "--global-batch", "1", "--peer", "trl-packed"], marks=NO_TRL),
]


def finished(folder: Path, name: str, *options: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints, and its line of JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *options, "--json", "result.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "result.jsonl").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
def test_a_benchmark_compares(command: list[str], tmp_path: Path) -> None:
    printed, result = finished(tmp_path, *command, "--rounds", "1", "--plot", "bars.png")
    assert result["ratio"] == pytest.approx(result["ours"] / result["peer"], rel=1e-3)
    assert {"machine", "threads", "torch", "goal", "ranges"} <= result.keys()
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert f"goal {result['goal']:g}" in printed


@pytest.mark.slow
def test_ways_to_launch_a_step(tmp_path: Path) -> None:
    sizes = ["--steps", "2", "--warm-up", "1", "--batch", "4"]
    _, result = finished(tmp_path, "step_variants.py", "--ways", "plain", *sizes)
    assert result["ways"]["plain"]["seconds"] > 0
    assert 0 < result["ways"]["plain"]["mfu"] < 1


def runs(**values: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {side: [{"speed": value} for value in found] for side, found in values.items()}


def test_the_ratio_is_that_of_the_medians() -> None:
    found = summary(runs(ours=[8.0, 1.0, 6.0], peer=[3.0, 2.0, 90.0]), "speed", 2.0)
    assert (found["ours"], found["peer"], found["ratio"], found["kept"]) == (6, 3, 2, True)
    assert found["ranges"] == {"ours": [1, 8], "peer": [2, 90]}
    assert not summary(runs(ours=[5.0], peer=[3.0]), "speed", 2.0)["kept"]


def test_where_less_is_better_the_goal_is_an_upper_one() -> None:
    assert summary(runs(ours=[7.0], peer=[10.0]), "speed", 0.8, smaller=True)["kept"]
    assert not summary(runs(ours=[9.0], peer=[10.0]), "speed", 0.8, smaller=True)["kept"]
