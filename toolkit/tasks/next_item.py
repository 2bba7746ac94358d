"""The next item of each user, ranked among all items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.compute.cross_entropy import IGNORED
from toolkit.compute.host import on_device
from toolkit.data.tables import Catalogue
from toolkit.tasks.base import Batch, Task, problem_of_tokens

TOP = 10


@dataclass
class HistoryBatch(Batch):
    """Histories of one micro-batch.

    Attributes:
        seen: in evaluation, (2, n): a row of the batch, and an item that its user had before; else (2, 0).
    """

    seen: torch.Tensor = torch.empty(2, 0, dtype=torch.long)

    def to(self, device: torch.device) -> HistoryBatch:
        """The same on `device`."""
        moved = super().to(device)
        assert isinstance(moved, HistoryBatch)
        return moved if device.type == "cpu" else replace(moved, seen=on_device(self.seen, device))


class NextItem(Task):
    """Cross-entropy of the next item over all of them; HR@10, NDCG@10 and MRR by its rank among all, none sampled.

    In evaluation, the rank of the item that came is one more than the number of others that score as high or higher.
    What the user had before is passed over where the catalogue says so, the item that came never is. The same is
    counted with the items' frequency in training as their scores: `popularity` among the figures.

    Args:
        catalogue: the items.
        fused: the model gives the summed loss instead of logits where it is given labels (`fuse_loss`).
    """

    unit = "items"

    def __init__(self, catalogue: Catalogue, *, fused: bool = False) -> None:
        self.items = len(catalogue.items)
        self.exclude_seen = catalogue.exclude_seen
        self.popularity = torch.tensor([0, *catalogue.counts], dtype=torch.float32)
        self.fused = fused

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> HistoryBatch:
        """Histories padded on the right with item 0: `input_ids` and `attention_mask` (B, L).

        In training the labels (B, L) are the item after each; in evaluation (B,) the one to be foreseen, from the
        `last` (B,) item of each history.
        """
        targets, histories = torch.tensor(rows["target"]), list(rows["items"])
        evaluated = bool((targets > 0).any())
        given = histories if evaluated else [items[:-1] for items in histories]
        lengths = torch.tensor([len(items) for items in given])
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        inputs = {"input_ids": _padded(given, there, 0), "attention_mask": there.long()}
        seen = [(row, item) for row, items in enumerate(rows["seen"]) for item in items]
        labels = targets if evaluated else _padded([items[1:] for items in histories], there, IGNORED)
        if empty and not evaluated:
            labels = torch.full_like(labels, IGNORED)
        more = {"last": lengths - 1} if evaluated else {"labels": labels} if self.fused else {}
        return HistoryBatch(
            inputs=inputs | more,
            labels=labels,
            weights=torch.zeros(len(given)) if empty else torch.ones(len(given)),
            ids=[] if empty else list(rows["id"]),
            seen=torch.tensor(seen, dtype=torch.long).reshape(-1, 2).T,
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No items, or one that is not in the catalogue."""
        return problem_of_tokens(row["items"], self.items + 1, None)

    def units(self, batch: Batch) -> int:
        """Items that are predicted."""
        return int((batch.labels != IGNORED).sum()) if batch.ids else 0

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy, summed over the items that are predicted."""
        if self.fused and outputs.logits.ndim == 1:
            return outputs.logits.float().sum()  # type: ignore[no-any-return]
        logits = outputs.logits.float().flatten(0, -2)
        losses = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
        weights = batch.weights if batch.labels.ndim == 1 else batch.weights.repeat_interleave(batch.labels.shape[1])
        return (losses * weights).sum()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Hits, gains and reciprocal ranks of the model and of popularity, cross-entropy, and number of users."""
        assert isinstance(batch, HistoryBatch)
        scores = outputs.logits.float()
        popular = self.popularity.to(scores.device).expand_as(scores)
        return {
            "model": self._gains(scores, batch),
            "popularity": self._gains(popular, batch),
            "loss": self.loss(outputs, batch).double(),
            "units": batch.weights.double().sum(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """HR@10, NDCG@10, MRR, loss, and the same of popularity."""
        units = max(float(counts["units"]), 1)
        model, popular = (_figures(counts[name], units) for name in ("model", "popularity"))
        return model | {"loss": float(counts["loss"]) / units, "units": int(units), "popularity": popular}

    def _gains(self, scores: torch.Tensor, batch: HistoryBatch) -> torch.Tensor:
        """Of each rank's worth the sum: (3,) in fp64."""
        ranks = rank_of(scores, batch.labels, batch.seen if self.exclude_seen else batch.seen[:, :0]).double()
        hits = (ranks <= TOP).double()
        worth = torch.stack([hits, hits / (1 + ranks).log2(), 1 / ranks])
        return (worth * batch.weights.double()).sum(1)


def rank_of(scores: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The rank of each row's target among all items but those that are passed over.

    Args:
        scores: (B, items and padding).
        targets: (B,).
        seen: (2, n), rows and items that are passed over.
    """
    rows = torch.arange(len(targets), device=targets.device)
    at_target = scores[rows, targets]
    among = torch.ones_like(scores, dtype=torch.bool)
    among[:, 0] = False
    among[seen[0], seen[1]] = False
    among[rows, targets] = True
    return (among & (scores >= at_target[:, None])).sum(1)


def _padded(rows: Sequence[Sequence[int]], there: torch.Tensor, filler: int) -> torch.Tensor:
    flat = torch.tensor([item for row in rows for item in row], dtype=torch.long)
    return torch.full(there.shape, filler).masked_scatter_(there, flat)


def _figures(gains: torch.Tensor, units: float) -> dict[str, float]:
    hits, gain, reciprocal = (gains / units).tolist()
    return {f"hit_rate_at_{TOP}": hits, f"ndcg_at_{TOP}": gain, "mrr": reciprocal}
