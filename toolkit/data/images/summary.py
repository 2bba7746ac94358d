"""What the plan and the report say of images, and those that the model took for something else."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from toolkit.config import AugmentConfig
from toolkit.data.images.prepare import ImageData
from toolkit.data.images.processor import thumbnail

_SHARES = ("shift", "crop", "rotate", "colour", "mixup", "cutmix")


def plan_of_images(data: ImageData, augment: AugmentConfig) -> dict[str, str]:
    """Lines of the plan: source, sizes, what was dropped, how the images are prepared and varied."""
    facts, processor = data.facts, data.processor
    sizes = {name: sum(labels.values()) for name, labels in facts["samples"].items()}
    dropped = {
        name.removesuffix("_dropped").replace("_", " "): count for name, count in _dropped(facts).items() if count
    }
    values = " and ".join(
        f"{what} {', '.join(f'{value:.3f}' for value in found)}"
        for what, found in (("mean", processor.mean), ("spread", processor.std))
    )
    kind = "grey" if processor.channels == 1 else "colours"
    return {
        "source": str(facts["source"]),
        "samples": ", ".join(f"{count:,} {name}" for name, count in sizes.items()),
        "labels": f"{len(data.labels)}, the most frequent has {majority_of_images(data):.1%} of the test",
        "dropped": ", ".join(f"{count:,} {name}" for name, count in dropped.items()) or "nothing",
        "images": f"{processor.size} x {processor.size} pixels, {kind}; {values} of values from 0 to 1",
        "varied": _varied(augment),
    }


def report_of_images(data: ImageData) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    return {
        "source": facts["source"],
        "fingerprint": data.fingerprint,
        "counts": facts["samples"],
        "dropped": _dropped(facts),
        "stages": facts["stages"],
        "mean": list(data.processor.mean),
        "std": list(data.processor.std),
        "warnings": facts["warnings"],
    }


def majority_of_images(data: ImageData) -> float:
    """Share of the test's most frequent label: the accuracy of a constant answer."""
    counts = data.facts["samples"]["test"].values()
    return float(max(counts) / sum(counts))


def show_mistakes(data: ImageData, test: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The test images of `mistakes` in a task's metrics, with where they are from, as a page can show them.

    Each is an `image` (a PNG in base64), `where`, `label`, `predicted` and `score` (its probability).
    """
    shown = []
    for mistake in test["mistakes"]:
        row = data.test[mistake["id"]]
        shown.append(
            {
                "image": base64.b64encode(thumbnail(row["image"])).decode("ascii"),
                "where": row["where"],
                "label": data.labels[row["label"]],
                "predicted": mistake["predicted"],
                "score": mistake["score"],
            }
        )
    return shown


def _varied(augment: AugmentConfig) -> str:
    if not augment.use:
        return "not at all"
    found = {name: getattr(augment, name) for name in _SHARES}
    nothing = {**dict.fromkeys(_SHARES, 0), "crop": 1}
    told = [f"{name} {value:g}" for name, value in found.items() if value != nothing[name]]
    return ", ".join([*told, *(["flip"] if augment.flip else [])]) or "not at all"


def _dropped(facts: Mapping[str, Any]) -> dict[str, int]:
    return {name: count for name, count in facts.items() if name.endswith("_dropped")}
