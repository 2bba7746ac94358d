"""What the plan and the report say of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.config import ChatConfig, CorpusConfig, PairsConfig, TextDataConfig
from toolkit.data.examples import Examples
from toolkit.data.language import LanguageData
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
        "labels": facts.get("about") or f"{len(data.labels)}, the most frequent has {majority(data):.1%} of the test",
        "dropped": ", ".join(f"{count:,} {name}" for name, count in dropped.items()) or "nothing",
        "length": f"at most {max_length} tokens, which cuts {truncated:.0%} of the training samples",
    }


def report_facts(data: TextClassification, max_length: int) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    return {
        "source": facts["source"],
        "fingerprint": data.fingerprint,
        "counts": facts["samples"],
        "dropped": _dropped(data),
        "lengths": _lengths(facts["token_lengths"]),
        "max_length": max_length,
        "truncated": facts["truncated"],
        "stages": facts["stages"],
        **({"constant": facts["constant"]} if "constant" in facts else {}),
        "warnings": facts["warnings"],
    }


def plan_of_texts(data: LanguageData, tokenizer: Any, config: CorpusConfig) -> dict[str, str]:
    """Lines of the plan: sources, sizes, what was dropped, how the texts lie in their sequences."""
    facts = data.facts
    return {
        "sources": _sources(facts),
        "texts": _counted(facts["texts"]),
        "dropped": _told(facts["dropped"]),
        "tokens": f"{_counted(facts['tokens'])}; a vocabulary of {len(tokenizer):,}",
        "sequences": f"{len(data.train):,} of {config.max_length} tokens, filled to {facts['filled']['train']:.1%}; "
        f"{facts['cut']['train']:.0%} of the texts are longer and go on in another",
    }


def report_of_texts(data: LanguageData, max_length: int) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    return {
        "source": ", ".join(facts["sources"]),
        "fingerprint": data.fingerprint,
        "texts": facts["texts"],
        "tokens": facts["tokens"],
        "sequences": facts["sequences"],
        "passes": facts["passes"],
        "filled": facts["filled"],
        "dropped": facts["dropped"],
        "languages": facts["languages"],
        "lengths": _lengths(facts["token_lengths"]),
        "max_length": max_length,
        "truncated": facts["cut"],
        "stages": facts["stages"],
        "warnings": facts["warnings"],
    }


def plan_of_chats(data: LanguageData, tokenizer: Any, config: ChatConfig) -> dict[str, str]:
    """Lines of the plan: sources, sizes, what was left out, what is learnt of the tokens, and what was cut off."""
    facts = data.facts
    learnt, tokens = facts["learnt"]["train"], facts["tokens"]["train"]
    answers = "all answers" if config.learn == "all" else "the last answer of each"
    cut = {"truncate": "lose their end", "drop": "are left out", "split": "go on in another sample"}[config.too_long]
    endless = facts["endless"]["train"]
    return {
        "sources": _sources(facts),
        "conversations": _counted(facts["sequences"]),
        "left out": _told(facts["dropped"]),
        "tokens": f"{_counted(facts['tokens'])}; a vocabulary of {len(tokenizer):,}",
        "learnt": f"{learnt:,} training tokens ({learnt / tokens:.0%}): {answers}, and the token that ends it",
        "length": f"at most {config.max_length} tokens; {facts['cut']['train']:.1%} of the conversations are longer "
        f"and {cut}" + (f"; {endless:,} answers lack their end" if endless else ""),
    }


def report_of_chats(data: LanguageData, max_length: int, name: str = "conversations") -> dict[str, Any]:
    """The data's part of report.json; the samples are called `name` in it."""
    facts = data.facts
    return {
        "source": ", ".join(facts["sources"]),
        "fingerprint": data.fingerprint,
        name: facts["sequences"],
        "tokens": facts["tokens"],
        "learnt": facts["learnt"],
        "passes": facts["passes"],
        "dropped": facts["dropped"],
        "languages": facts["languages"],
        "lengths": _lengths(facts["token_lengths"]),
        "max_length": max_length,
        "truncated": facts["cut"],
        "endless": facts["endless"],
        "stages": facts["stages"],
        "warnings": facts["warnings"],
    }


def plan_of_pairs(data: LanguageData, tokenizer: Any, config: PairsConfig) -> dict[str, str]:
    """Lines of the plan: sources, sizes, what was left out, and what was cut off."""
    facts = data.facts
    cut = {"truncate": "lose the end of it", "drop": "are left out"}[config.too_long]
    endless = facts["endless"]["train"]
    return {
        "sources": _sources(facts),
        "pairs": _counted(facts["sequences"]),
        "left out": _told(facts["dropped"]),
        "tokens": f"{_counted(facts['tokens'])}, both answers and the question of each; "
        f"a vocabulary of {len(tokenizer):,}",
        "length": f"at most {config.max_length} tokens; {facts['cut']['train']:.1%} of the pairs have a longer answer "
        f"and {cut}" + (f"; {endless:,} lack an answer's end" if endless else ""),
    }


def report_of_pairs(data: LanguageData, max_length: int) -> dict[str, Any]:
    """The data's part of report.json."""
    return report_of_chats(data, max_length, "pairs")


def plan_of_examples(data: Examples, max_length: int | None = None) -> dict[str, str]:
    """Lines of the plan: sources, sizes, what was dropped, and what was cut off at so many tokens."""
    facts = data.facts
    rows = {
        "sources": _sources(facts),
        "samples": _counted(facts["samples"]),
        "dropped": _told(facts["dropped"]),
    }
    if max_length is not None:
        cut = facts["cut"]["train"]
        rows["length"] = f"at most {max_length} tokens, which cuts {cut:.0%} of the training samples"
    return rows


def report_of_examples(data: Examples, max_length: int | None = None) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    lengths = (
        {}
        if max_length is None
        else {
            "lengths": _lengths(facts["token_lengths"]),
            "max_length": max_length,
            "truncated": facts["cut"],
        }
    )
    return {
        "source": ", ".join(facts["sources"]),
        "fingerprint": data.fingerprint,
        "samples": facts["samples"],
        "passes": facts["passes"],
        "dropped": facts["dropped"],
        "languages": facts["languages"],
        "stages": facts["stages"],
        "warnings": facts["warnings"],
        **lengths,
    }


def majority(data: TextClassification) -> float | None:
    """Share of the test's most frequent label, the accuracy of a constant answer; None where it is not one of them."""
    if "constant" in data.facts:
        return None
    counts = data.facts["samples"]["test"].values()
    return float(max(counts) / sum(counts))


def predict_example(config: TextDataConfig) -> str:
    """What `toolkit predict` is to be given: a text, or a row with both of a pair."""
    if config.text_pair is None:
        return '"TEXT"'
    return f'\'{{"{config.text}": "TEXT", "{config.text_pair}": "TEXT"}}\''


def _sources(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        name if passes == 1 else f"{name} ({passes:.2f} times an epoch)"
        for name, passes in zip(facts["sources"], facts["passes"], strict=True)
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _told(dropped: Mapping[str, int]) -> str:
    return _counted({why: count for why, count in dropped.items() if count}) or "nothing"


def _dropped(data: TextClassification) -> dict[str, int]:
    return {name: count for name, count in data.facts.items() if name.endswith("_dropped")}


def _lengths(histograms: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Sequence[int]]]:
    """Edges and counts of each split, without what lies beyond the longest sample."""
    counts = {split: found for split, found in histograms.items() if split != "edges"}
    edges = [*histograms["edges"], 2 * histograms["edges"][-1]]  # the last bin is open: close it
    bins = 1 + max(i for found in counts.values() for i, count in enumerate(found) if count)
    return {split: {"edges": edges[: bins + 1], "counts": found[:bins]} for split, found in counts.items()}
