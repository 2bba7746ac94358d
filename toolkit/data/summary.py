"""What the plan and the report say of the data."""

from __future__ import annotations

from typing import Any

from toolkit.data.text_classification import TextClassification


def plan_rows(data: TextClassification, max_length: int) -> dict[str, str]:
    """Lines of the plan: source, sizes, what was dropped, how long the samples are."""
    facts = data.facts
    sizes = {name: sum(labels.values()) for name, labels in facts["samples"].items()}
    dropped = {
        name.removesuffix("_dropped").replace("_", " "): count for name, count in _dropped(data).items() if count
    }
    truncated = facts["truncated"]["train"]
    return {
        "source": str(facts["source"]),
        "samples": ", ".join(f"{count:,} {name}" for name, count in sizes.items()),
        "labels": f"{len(data.labels)}, the most frequent has {majority(data):.1%} of the test",
        "dropped": ", ".join(f"{count:,} {name}" for name, count in dropped.items()) or "nothing",
        "length": f"at most {max_length} tokens, which cuts {truncated:.0%} of the training samples",
    }


def report_facts(data: TextClassification, max_length: int) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    histograms = {split: counts for split, counts in facts["token_lengths"].items() if split != "edges"}
    # The last bin is open: close it, and leave out what lies beyond the longest sample.
    edges = [*facts["token_lengths"]["edges"], 2 * facts["token_lengths"]["edges"][-1]]
    bins = 1 + max(i for counts in histograms.values() for i, count in enumerate(counts) if count)
    return {
        "source": facts["source"],
        "fingerprint": data.fingerprint,
        "counts": facts["samples"],
        "dropped": _dropped(data),
        "lengths": {
            split: {"edges": edges[: bins + 1], "counts": counts[:bins]} for split, counts in histograms.items()
        },
        "max_length": max_length,
        "truncated": facts["truncated"],
        "warnings": facts["warnings"],
    }


def majority(data: TextClassification) -> float:
    """Share of the test's most frequent label: the accuracy of a constant answer."""
    counts = data.facts["samples"]["test"].values()
    return float(max(counts) / sum(counts))


def _dropped(data: TextClassification) -> dict[str, int]:
    return {name: count for name, count in data.facts.items() if name.endswith("_dropped")}
