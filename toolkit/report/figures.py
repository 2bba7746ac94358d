"""The figures of evaluations: what each is called, which way is better, and where it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple


class Figure(NamedTuple):
    """A figure that a task's metrics may hold.

    Attributes:
        key: in the metrics.
        name: for people.
        better: which way it is to go; None where neither is better.
        share: it is a share of what could be reached, from 0 to 1, and is plotted as such.
        headline: it stands on a tile of the report, and in the line of an evaluation.
    """

    key: str
    name: str
    better: Literal["higher", "lower"] | None = "higher"
    share: bool = False
    headline: bool = True


FIGURES = (
    # classes
    Figure("accuracy", "accuracy", share=True),
    Figure("exact_match", "exact match", share=True),
    Figure("token_f1", "F1 of the words", share=True),
    Figure("macro_precision", "macro precision", headline=False),
    Figure("macro_recall", "macro recall", headline=False),
    Figure("macro_f1", "macro F1", share=True),
    Figure("micro_f1", "micro F1", share=True),
    # spans
    Figure("entity_precision", "entity precision", headline=False),
    Figure("entity_recall", "entity recall", headline=False),
    Figure("entity_f1", "entity F1", share=True),
    # measurements
    Figure("r2", "R²", share=True),
    Figure("mae", "mean absolute error", "lower"),
    Figure("rmse", "root mean squared error", "lower", headline=False),
    Figure("pearson", "Pearson correlation", share=True),
    Figure("spearman", "Spearman correlation", share=True),
    # ranks
    Figure("recall_at_1", "recall@1", share=True),
    Figure("recall_at_10", "recall@10", share=True),
    Figure("mrr", "mean reciprocal rank", headline=False),
    Figure("hit_rate_at_10", "HR@10", share=True),
    Figure("ndcg_at_10", "NDCG@10", share=True),
    # texts
    Figure("bleu", "BLEU"),
    Figure("chrf", "chrF"),
    Figure("rouge1", "ROUGE-1", share=True),
    Figure("rouge2", "ROUGE-2", share=True),
    Figure("rougeL", "ROUGE-L", share=True),
    Figure("wer", "word error rate", "lower"),
    Figure("cer", "character error rate", "lower", headline=False),
    Figure("perplexity", "perplexity", "lower"),
    Figure("bits_per_byte", "bits per byte", "lower"),
    # preferences
    Figure("reward_margin", "reward margin"),
    Figure("reward_accuracy", "reward accuracy", share=True),
    Figure("likelier", "preferred answer likelier", share=True, headline=False),
    Figure("chosen_reward", "reward of the preferred", None, headline=False),
    Figure("rejected_reward", "reward of the other", None, headline=False),
    # all
    Figure("loss", "loss", "lower", headline=False),
    Figure("units", "samples or tokens", None, headline=False),
)
"""All that are known, in the order in which they are shown."""


def figures_in(*metrics: Mapping[str, Any]) -> Iterator[Figure]:
    """Those that one of the metrics holds."""
    return (figure for figure in FIGURES if any(figure.key in found for found in metrics))


def titled(name: str) -> str:
    """A name at the beginning of a line."""
    return name[0].upper() + name[1:]
