"""What the benchmarks of language models share: the figures of a run, what both sides must have in common, the end."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import Figures, machine, median, read_run, run, show, summary, words, write

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 6
SPEED_GOAL, MEMORY_GOAL = 1.2, 0.8


def recipe(name: str, target: Path, steps: int, options: Mapping[str, Any]) -> tuple[list[Figures], Figures]:
    """One run of a recipe in bf16, with nothing between its steps; the figures of each step, and its report."""
    given = {
        "train.steps": steps,
        "precision": "bf16",
        "checkpoint.save_model": False,
        "checkpoint.asynchronous": False,  # the peers write none, and hold no copy of weights and moments for it
        "checkpoint.every_minutes": None,
        "run.dir": target,
        "run.eval_every": steps,
        **options,
    }
    run([sys.executable, str(ROOT / "recipes" / name), *words(given), "--generate.prompts"])
    shutil.rmtree(target / "checkpoints")  # three times the weights for each round
    return read_run(target)


def peer(script: str, name: str, options: Mapping[str, Any]) -> Figures:
    """What a peer's script prints."""
    printed = run([sys.executable, str(ROOT / "benchmarks" / script), name, *words(options)])
    found: Figures = json.loads(printed.splitlines()[-1])
    return found


def figures(seconds: Sequence[float], tokens: Sequence[int], losses: Sequence[float], **more: Any) -> Figures:
    """Of one run: tokens a second without the first steps, the mean loss of the last quarter of the steps, and more."""
    quarter = max(1, len(losses) // 4)
    return {
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "loss": statistics.fmean(losses[-quarter:]),
        **more,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """As JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def check_steps(parser: argparse.ArgumentParser, steps: int) -> None:
    """Some steps must be left to be timed."""
    if steps <= WARM_UP:
        parser.error(f"--steps {steps}: the first {WARM_UP} are not timed, choose more")


def compare(runs: Mapping[str, list[Figures]], apart: Mapping[str, float]) -> Figures:
    """Speed and memory with their goals, and whether both sides did the same.

    Args:
        runs: of `ours` and `peer`.
        apart: figures of the runs, and the largest difference that each may have between the sides' medians.
    """
    peak = summary(runs, "peak_bytes", MEMORY_GOAL, smaller=True)
    both = {figure: {side: median(runs[side], figure) for side in runs} for figure in apart}
    return {
        **summary(runs, "tokens_per_second", SPEED_GOAL),
        "memory_ratio": peak["ratio"],
        "memory_goal": peak["goal"],
        "memory_kept": peak["kept"],
        "peak_gib": {side: round(peak[side] / 2**30, 2) for side in runs},
        **{figure: {side: round(value, 4) for side, value in found.items()} for figure, found in both.items()},
        "bounds": dict(apart),
        "apart": [name for name, most in apart.items() if abs(both[name]["ours"] - both[name]["peer"]) > most],
    }


def conclude(result: Figures, options: argparse.Namespace, names: Mapping[str, str], title: str) -> None:
    """Show and write the result; end with an error where the sides did not do the same."""
    result |= machine()
    show(result, names)
    kept = "kept" if result["memory_kept"] else "MISSED"
    print(f"memory: {result['memory_ratio']:.2f} times; goal {result['memory_goal']:g}: {kept}")
    for what in ("peak_gib", "mfu", *result["bounds"]):
        if what in result:
            print(f"{what}: {result[what]['ours']} against {result[what]['peer']}")
    write(result, options, names, title)
    if result["apart"]:
        raise SystemExit(f"the two did not do the same: {', '.join(result['apart'])} too far apart")
