"""Start recipes as users do, and in processes that have imported everything already."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import on_ranks

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "bert_cls.py"


def launch(
    options: list[str], *, config: str, launcher: list[str] | None = None, cwd: Path, name: str = "bert_cls"
) -> Any:
    """`accelerate launch` with a shipped configuration, on CPU ranks whatever the machine has; the finished process."""
    process = start(options, config=config, launcher=launcher, cwd=cwd, name=name)
    try:
        out, _ = process.communicate(timeout=240)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def start(
    options: list[str], *, config: str, launcher: list[str] | None = None, cwd: Path, name: str = "bert_cls"
) -> subprocess.Popen[str]:
    """The same, still running, in a process group of its own."""
    file = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    # One thread for each process, as ranks have: the sums of two threads differ from those of one in the last bits.
    start_options = ["--num_cpu_threads_per_process", "1"] if config == "cpu1" else ["--main_process_port", "0"]
    return subprocess.Popen(
        [*accelerate, *start_options, *(launcher or []), str(RECIPE.with_stem(name)), *options],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def environment() -> dict[str, str]:
    """That of a user without a GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_"))}
    return kept | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def recipe(
    argv: list[str], cwd: str, main: Callable[[Any], None] | None = None, name: str = "bert_cls"
) -> tuple[int, str]:
    """A recipe's command line in this process (a forked one): exit code and all that it printed.

    Another `main` with the same settings may stand in for the recipe's.
    """
    from toolkit.start import start as start_recipe

    module = importlib.import_module(f"recipes.{name}")

    os.chdir(cwd)
    sys.argv = [str(RECIPE.with_stem(name)), *argv]
    code, text = 0, io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            start_recipe(main or module.main, module.Config, module.__doc__ or "")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, text.getvalue()


def learn(name: str, ranks: int, options: list[str], cwd: Path, code: int = 0) -> str:
    """The same on so many ranks, which all end with this code; what the first has printed, unframed, on one line."""
    cwd.mkdir(exist_ok=True)
    ended = on_ranks(recipe, ranks, options, str(cwd), None, name, timeout=240)
    assert {its for its, _ in ended} == {code}, ended[0][1]
    return " ".join(ended[0][1].replace("│", " ").split())


def read(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and report of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((run / "report.json").read_text(encoding="utf-8"))


def assert_same_curve(
    metrics: list[dict[str, Any]], expected: list[dict[str, Any]], absolute: float | None = None
) -> None:
    """The same steps with the same units, and in fp32 the same losses and gradient norms."""
    assert [line["units"] for line in metrics] == [line["units"] for line in expected]
    for figure in ("loss", "grad_norm"):
        wanted = pytest.approx([line[figure] for line in expected], rel=1e-5, abs=absolute)
        assert [line[figure] for line in metrics] == wanted, figure
