"""What the benchmarks share: runs in turns, medians and ratios, a table, a bar chart, the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.device import device
from benchmarks.lines import write_line

Figures = dict[str, Any]
"""Of one run: the measured figure and whatever else is worth a median."""


def add_options(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    """`--rounds`, `--json` and `--plot`."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"runs of each side, in turns (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as a line of JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart (PNG, SVG or PDF)")


def in_turns(sides: Mapping[str, Callable[[int], Figures]], rounds: int, figure: str) -> dict[str, list[Figures]]:
    """The runs of each side: one after the other, round by round, so that a noisy hour is noisy for both."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, run in sides.items():
            runs[side].append(run(number))
            print(f"round {number + 1}, {side}: {figure} {runs[side][-1][figure]:.4g}", file=sys.stderr, flush=True)
    return runs


def summary(runs: Mapping[str, list[Figures]], figure: str, goal: float, *, smaller: bool = False) -> Figures:
    """Medians of `ours` and `peer`, from – to, and their ratio.

    Args:
        runs: of `ours` and `peer`.
        figure: the one that is compared.
        goal: least ratio ours / peer, or the largest where `smaller` figures are better.
        smaller: whether they are.
    """
    values = {side: sorted(run[figure] for run in found) for side, found in runs.items()}
    ours, peer = (statistics.median(values[side]) for side in ("ours", "peer"))
    ratio = ours / peer
    return {
        "figure": figure,
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        "goal": goal,
        "kept": ratio <= goal if smaller else ratio >= goal,
        "ranges": {side: [found[0], found[-1]] for side, found in values.items()},
        "rounds": len(values["ours"]),
    }


def median(runs: list[Figures], figure: str) -> float:
    """Of another figure of the runs."""
    return float(statistics.median(run[figure] for run in runs))


def machine() -> Figures:
    """What the figures were measured on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    wanted = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    return {
        "machine": f"{os.cpu_count()} cores, {name[1] if name else platform.machine()}",
        "instructions": [flag for flag in wanted if flag in text.split()],
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if device().type == "cuda" else {}),
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(result: Figures, names: Mapping[str, str], *, digits: int = 1) -> None:
    """The table, and below it whether the goal is kept."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", result["figure"].replace("_", " "), "from – to"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for side in ("ours", "peer"):
        low, high = result["ranges"][side]
        table.add_row(names[side], f"{result[side]:.{digits}f}", f"{low:.{digits}f} – {high:.{digits}f}")
    console = Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(f"{result['ratio']:.2f} times; goal {result['goal']:g}: {'kept' if result['kept'] else 'MISSED'}")


def write(result: Figures, options: argparse.Namespace, names: Mapping[str, str], title: str) -> None:
    """As a line of JSON and a chart, where they were asked for; the line on the screen in any case."""
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in result.items()}
    write_line(rounded, options.json)
    if options.plot:
        plot(result, names, title, options.plot)


def plot(result: Figures, names: Mapping[str, str], title: str, path: Path) -> None:
    """Both sides as bars, with the spread of the runs."""
    from matplotlib.figure import Figure

    sides = ("peer", "ours")
    values = [result[side] for side in sides]
    spread = [[abs(result[side] - result["ranges"][side][end]) for side in sides] for end in (0, 1)]
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.barh([names[side] for side in sides], values, xerr=spread, color=["#999999", "#3069b5"], capsize=3)
    axes.set_xlabel(f"{result['figure'].replace('_', ' ')} (median; from – to)")
    axes.set_title(f"{title}: {result['ratio']:.2f} times")
    figure.savefig(path, dpi=150)


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """What a process prints; its failure ends the benchmark."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def read_run(folder: Path) -> tuple[list[Figures], Figures]:
    """The figures of each step of a recipe's run, with `step_seconds` among them, and its report."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before = 0
    for line in lines:
        line["step_seconds"] = (line["samples_seen"] - before) / line["samples_per_second"]
        before = line["samples_seen"]
    return lines, json.loads((folder / "report.json").read_text(encoding="utf-8"))
