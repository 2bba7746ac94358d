"""What became of a run that was disturbed, held against the same tool's run that was not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.resume_runs import Ended


@dataclass(frozen=True)
class Part:
    """What one start of a run computed: for each step its epoch, and the samples of all ranks."""

    from_step: int
    to_step: int
    epochs: Mapping[int, int]
    samples: Mapping[int, list[int]]


@dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    Attributes:
        parts: one for each start that came to a step.
        curve: loss and learning rate of each step that counts.
        weights: file of the trained model; may be missing.
    """

    parts: list[Part]
    curve: Mapping[int, tuple[float, float]]
    weights: Path


def read_parts(ledgers: Path) -> list[Part]:
    """The starts, the first one first. Both tools write one folder for each, with one file for each rank."""
    return [part for folder in sorted(ledgers.glob("attempt_*")) if (part := _part(folder))]


def trainer_curve(ledgers: Path) -> dict[int, tuple[float, float]]:
    """Loss, as the mean over the samples of all ranks, and learning rate, from what the ranks recorded."""
    curve: dict[int, tuple[float, float]] = {}
    for folder in sorted(ledgers.glob("attempt_*")):
        lines: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("rank_*.jsonl")):
            for line in _lines(path):
                lines.setdefault(line["step"], []).append(line)
        if lines:
            curve = {step: figures for step, figures in curve.items() if step < min(lines)}
        for step, parts in lines.items():
            samples = sum(len(part["ids"]) for part in parts)
            curve[step] = sum(part["loss"] for part in parts) / samples, parts[0]["lr"]
    return curve


def toolkit_curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and learning rate from the run's metrics."""
    return {line["step"]: (line["loss"], line["lr"]) for line in _lines(run / "metrics.jsonl")}


def count_samples(parts: list[Part], ids: set[int], epochs: int) -> tuple[int, int]:
    """How often a sample was missing in an epoch, and how often one was seen once more in it.

    A start undoes what those before it computed past the step that it goes on from.
    """
    seen: Counter[tuple[int, int]] = Counter()
    for index, part in enumerate(parts):
        undone_after = min((later.from_step for later in parts[index + 1 :]), default=part.to_step)
        for step, samples in part.samples.items():
            if step <= undone_after:
                seen.update((part.epochs[step], sample) for sample in samples)
    lost = sum((epoch, sample) not in seen for epoch in range(epochs) for sample in ids)
    return lost, sum(count - 1 for count in seen.values())


def compare(run: Run, whole: Run, ended: Ended, ids: set[int], epochs: int) -> dict[str, Any]:
    """The figures of a run that was killed and started once more; `whole` is the one that nothing disturbed."""
    before = run.parts[0]
    resumed = ended.code == 0 and len(run.parts) > 1
    figures: dict[str, Any] = {
        "resumed": resumed,
        "rc": ended.code,
        "error": ended.error,
        "seconds": round(ended.seconds, 1),
        "cpu_seconds": round(ended.cpu_seconds, 1),
        "killed_after_step": before.to_step,
    }
    if not resumed:
        return figures
    after = run.parts[-1]
    lost, twice = count_samples(run.parts, ids, epochs)
    return figures | {
        "from_step": after.from_step,
        "steps_repeated": before.to_step - after.from_step,
        "lost": lost,
        "seen_again": twice,
        "last_step": after.to_step,
        "steps_computed": sum(part.to_step - part.from_step for part in run.parts),
        **_compare_curves(run.curve, whole.curve, after.from_step),
        **_compare_weights(run.weights, whole.weights),
    }


def reproducible(run: Run, whole: Run, until: int) -> bool:
    """Whether what was computed before the kill is what the undisturbed run computed, to the last bit.

    Otherwise equal bits after a resume would be nothing to ask for.
    """
    return all(run.curve[step] == whole.curve[step] for step in range(1, until + 1))


def _compare_curves(
    curve: Mapping[int, tuple[float, float]], whole: Mapping[int, tuple[float, float]], from_step: int
) -> dict[str, Any]:
    shared = [step for step in curve if step > from_step and step in whole]
    peak = max(rate for _, rate in whole.values())
    rates = [abs(curve[step][1] - whole[step][1]) / peak for step in shared]
    losses = [abs(curve[step][0] - whole[step][0]) / abs(whole[step][0]) for step in shared]
    return {
        "shared_steps": len(shared),
        "lr_differs": sum(rate > 0 for rate in rates),
        "lr_largest_share_of_peak": max(rates),
        "losses_equal": sum(loss == 0 for loss in losses),
        "loss_largest_relative": max(losses),
    }


def _compare_weights(path: Path, whole: Path) -> dict[str, Any]:
    """Whether they are equal to the last bit; else the distance as a share of the length of all of them."""
    weights, others = load_file(path), load_file(whole)
    if weights.keys() != others.keys():
        raise RuntimeError(f"{path} and {whole} do not hold the same tensors")
    apart = torch.cat([(weights[name].double() - others[name].double()).flatten() for name in others])
    length = torch.cat([tensor.double().flatten() for tensor in others.values()])
    return {
        "weights_equal": all(torch.equal(weights[name], others[name]) for name in others),
        "weights_relative": float(apart.norm() / length.norm()),
    }


def _part(folder: Path) -> Part | None:
    epochs: dict[int, int] = {}
    samples: dict[int, list[int]] = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for line in _lines(path):
            epochs[line["step"]] = line["epoch"]
            samples.setdefault(line["step"], []).extend(line["ids"])
    return Part(min(samples) - 1, max(samples), epochs, samples) if samples else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Without the last one, where a kill has cut it short."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
