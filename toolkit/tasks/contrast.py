"""Which texts belong together: vectors of texts, learnt by contrast and measured by what is found with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.tasks.base import Batch, Task, problem_of_tokens, whole_numbers
from toolkit.world import World

ROLES = ("anchor", "positive", "negative")
"""Of the texts of a sample, in their order."""
_ANCHORS_AT_ONCE = 1024
"""That are compared with all candidates of an evaluation."""


@dataclass(frozen=True)
class Ahead:
    """What is known of a micro-batch once all texts of the step have been seen.

    Attributes:
        loss: summed over its anchors, () without a graph.
        gradient: of the loss of the whole step by the vectors of its texts, (texts, features).
    """

    loss: torch.Tensor
    gradient: torch.Tensor


@dataclass
class ContrastBatch(Batch):
    """The texts of some samples, each in a row of its own; `labels` are their keys, by which equal ones are known.

    Attributes:
        anchors: rows of the anchors, one for each sample; none for the filler.
        candidates: rows of all that may be found: positives and negatives.
        positives: for each anchor, which of the `candidates` is the right one.
        roles: of each row, as in `ROLES`.
        ahead: set by `survey`.
    """

    anchors: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    positives: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    ahead: Ahead | None = None


@dataclass(frozen=True)
class _Met:
    """Texts of some samples, by their vectors (fp32) and keys; `positives` as in the batch."""

    anchors: torch.Tensor
    anchor_keys: torch.Tensor
    candidates: torch.Tensor
    candidate_keys: torch.Tensor
    positives: torch.Tensor


class Contrast(Task):
    """InfoNCE (van den Oord et al. 2018, equation 4): an anchor is to be nearer to its positive than to all others.

    The others are the positives and negatives of the whole step, on whatever ranks and in whatever micro-batches they
    lie: `survey` sees all texts first, without a graph, and finds by what each vector must change; then each
    micro-batch is computed again with a graph, and its loss brings that gradient along (GradCache, Gao et al. 2021).
    So the loss and its gradient depend on the samples of the step alone. A text that stands in the step twice is no
    negative of itself.

    In evaluation each anchor looks for its positive among all different candidates of the split.

    Args:
        tokenizer: its padding token fills what is not looked at.
        pooling: the vector of a text: the mean over its tokens, or that of the first.
        temperature: cosines are divided by it.
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens of the longest text that the model takes; None for any number.
    """

    unit = "pairs"

    def __init__(
        self,
        tokenizer: Any,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        temperature: float = 0.05,
        vocabulary: int,
        positions: int | None = None,
    ) -> None:
        self.padding = tokenizer.pad_token_id
        self.pooling = pooling
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.positions = positions
        self._met: list[_Met] = []

    def describe(self) -> dict[str, str]:
        """Lines of the plan."""
        return {
            "loss": f"InfoNCE over the whole global batch, temperature {self.temperature:g}",
            "vector of a text": {"mean": "the mean over its tokens", "cls": "its first token"}[self.pooling],
        }

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> ContrastBatch:
        """Texts padded on the right: `input_ids` and `attention_mask` (texts, L); labels and weights (texts,)."""
        lengths = torch.tensor([length for pieces in rows["pieces"] for length in pieces])
        tokens = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in rows["input_ids"]]))
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.full(there.shape, self.padding).masked_scatter_(there, tokens)
        roles = [role for pieces in rows["pieces"] for role in range(len(pieces))]
        candidates = [row for row, role in enumerate(roles) if role]
        return ContrastBatch(
            inputs={"input_ids": input_ids, "attention_mask": there.long()},
            labels=torch.tensor([key for keys in rows["keys"] for key in keys]),
            weights=torch.zeros(len(roles)) if empty else torch.ones(len(roles)),
            ids=[] if empty else list(rows["id"]),
            anchors=[] if empty else [row for row, role in enumerate(roles) if role == 0],
            candidates=[] if empty else candidates,
            positives=[] if empty else [at for at, row in enumerate(candidates) if roles[row] == 1],
            roles=roles,
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """It is no two or three texts, or one has no tokens, too many, or one without an embedding."""
        pieces = whole_numbers(row["pieces"])
        if pieces is None or len(pieces) not in (2, 3) or pieces.min() < 1 or pieces.sum() != len(row["input_ids"]):
            return "its texts do not add up to its tokens"
        if len(row["keys"]) != len(pieces):
            return "it has keys for other texts than it has"
        if self.positions is not None and pieces.max() > self.positions:
            return f"it has a text of {pieces.max()} tokens, of which the model takes {self.positions}"
        return problem_of_tokens(row["input_ids"], self.vocabulary, None)

    def title(self, batch: Batch, row: int) -> str:
        """What the text is to its pair."""
        assert isinstance(batch, ContrastBatch)
        return f"the {ROLES[batch.roles[row]]}"

    def units(self, batch: Batch) -> int:
        """Anchors."""
        return len(batch.ids)

    def vectors(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Of the texts: (texts, features) in fp32, of length 1."""
        return embed(outputs.last_hidden_state, batch.inputs["attention_mask"], self.pooling)

    def survey(self, batches: Sequence[Batch], forward: Callable[[Batch], Any], world: World) -> None:
        """Let all micro-batches of this rank know what the others of the step make of them. Collective."""
        mine = [batch for batch in batches if isinstance(batch, ContrastBatch)]
        devices = [world.device] if world.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # dropout is to draw the same masks again
            vectors = [self.vectors(forward(batch), batch) for batch in mine]
        look_ahead(mine, vectors, self.temperature, world)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Summed over the anchors, with the gradient of the whole step by these texts.

        Where no `survey` has been, the batch is a step of its own.
        """
        assert isinstance(batch, ContrastBatch)
        vectors = self.vectors(outputs, batch)
        if batch.ahead is None:
            met = _met(batch, vectors)
            return _info_nce(met, met.candidates, met.candidate_keys, met.positives, self.temperature).sum() + (
                0 * vectors.sum()
            )
        carried = (vectors * batch.ahead.gradient).sum()
        return batch.ahead.loss + carried - carried.detach()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Pairs; what is found is known when all candidates are."""
        assert isinstance(batch, ContrastBatch)
        vectors = self.vectors(outputs, batch)
        self._met.append(_met(batch, vectors))
        return {"units": torch.tensor(float(len(batch.ids)), dtype=torch.float64, device=vectors.device)}

    def conclude(self, world: World) -> dict[str, torch.Tensor]:
        """What the anchors of this rank find among the candidates of all. Collective."""
        met, self._met = _joined(self._met), []
        candidates, _ = world.rows(met.candidates)
        keys, _ = world.rows(met.candidate_keys)
        return retrieval(met, candidates, keys, self.temperature)

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Recall@1 and @10, mean reciprocal rank, and the InfoNCE over all different candidates of the split."""
        units = float(counts["units"])
        mean = {name: float(counts[name]) / units for name in ("loss", "first", "among_10", "reciprocal")}
        return {
            "recall_at_1": mean["first"],
            "recall_at_10": mean["among_10"],
            "mrr": mean["reciprocal"],
            "loss": mean["loss"],
            "units": int(units),
        }


def embed(states: torch.Tensor, mask: torch.Tensor, pooling: Literal["mean", "cls"]) -> torch.Tensor:
    """The vectors of texts.

    Args:
        states: of their tokens, (texts, L, features).
        mask: 1 for tokens and 0 for padding, (texts, L).
        pooling: the mean over the tokens, or the first.

    Returns:
        (texts, features) in fp32, of length 1.
    """
    states = states.float()
    if pooling == "cls":
        return F.normalize(states[:, 0], dim=-1)
    weights = mask.to(states.dtype).unsqueeze(-1)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def look_ahead(
    batches: Sequence[ContrastBatch], vectors: Sequence[torch.Tensor], temperature: float, world: World
) -> None:
    """Set `ahead` of each batch. Collective.

    Args:
        batches: of this rank in one step.
        vectors: of their texts, (texts, features), without a graph.
        temperature: of the loss.
        world: connected ranks.
    """
    met = [_met(batch, its) for batch, its in zip(batches, vectors, strict=True)]
    mine = _joined(met)
    candidates, first = world.rows(mine.candidates)
    keys, _ = world.rows(mine.candidate_keys)
    candidates = candidates.requires_grad_()
    gradients: list[Any] = []
    losses: list[torch.Tensor] = []
    begins = [first + sum(len(each.candidates) for each in met[:index]) for index in range(len(met) + 1)]
    for each, begin in zip(met, begins, strict=False):
        anchors = each.anchors.clone().requires_grad_()
        seen = _Met(anchors, each.anchor_keys, each.candidates, each.candidate_keys, each.positives)
        with torch.enable_grad():
            loss = _info_nce(seen, candidates, keys, each.positives + begin, temperature).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(anchors.grad)
        losses.append(loss.detach())
    total = torch.zeros_like(candidates) if candidates.grad is None else candidates.grad
    total = world.sum(total.detach())
    for batch, its, (begin, end), of_anchors, loss in zip(
        batches, vectors, pairwise(begins), gradients, losses, strict=True
    ):
        gradient = torch.zeros_like(its)
        gradient[batch.anchors] = of_anchors
        gradient[batch.candidates] = total[begin:end]
        batch.ahead = Ahead(loss, gradient)


def retrieval(met: _Met, candidates: torch.Tensor, keys: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
    """How the anchors of `met` rank their positives among all different candidates: sums over them, in fp64.

    One that is as near as the positive counts as nearer: vectors that are all alike find nothing.
    """
    order = torch.argsort(keys, stable=True)
    different = torch.ones_like(keys, dtype=torch.bool)
    different[1:] = keys[order][1:] != keys[order][:-1]
    order = order[different]
    pool, pool_keys = candidates[order], keys[order].contiguous()
    sums = {
        name: torch.zeros((), dtype=torch.float64, device=pool.device)
        for name in ("loss", "first", "among_10", "reciprocal")
    }
    right = torch.searchsorted(pool_keys, met.candidate_keys[met.positives])
    for begin in range(0, len(right), _ANCHORS_AT_ONCE):
        part = slice(begin, begin + _ANCHORS_AT_ONCE)
        similarity = met.anchors[part] @ pool.T
        similarity = similarity.masked_fill(met.anchor_keys[part, None] == pool_keys, -torch.inf)
        own = similarity.gather(1, right[part, None])
        rank = (similarity >= own).sum(1)
        losses = (similarity / temperature).logsumexp(1) - own[:, 0] / temperature
        sums["loss"] += losses.double().sum()
        sums["first"] += (rank == 1).sum()
        sums["among_10"] += (rank <= 10).sum()
        sums["reciprocal"] += (1 / rank.double()).sum()
    return sums


def _met(batch: ContrastBatch, vectors: torch.Tensor) -> _Met:
    keys = batch.labels.to(vectors.device)
    return _Met(
        vectors[batch.anchors],
        keys[batch.anchors],
        vectors[batch.candidates],
        keys[batch.candidates],
        torch.tensor(batch.positives, dtype=torch.long, device=vectors.device),
    )


def _joined(met: Sequence[_Met]) -> _Met:
    """All of them in one."""
    begins = np.cumsum([0, *(len(each.candidates) for each in met[:-1])]).tolist()
    return _Met(
        torch.cat([each.anchors for each in met]),
        torch.cat([each.anchor_keys for each in met]),
        torch.cat([each.candidates for each in met]),
        torch.cat([each.candidate_keys for each in met]),
        torch.cat([each.positives + begin for each, begin in zip(met, begins, strict=True)]),
    )


def _info_nce(
    met: _Met, candidates: torch.Tensor, keys: torch.Tensor, right: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The loss of each anchor of `met`, (anchors,).

    Args:
        met: its vectors and keys are read.
        candidates: of the whole step, (candidates, features), with their `keys`.
        right: for each anchor, which of them is its positive.
        temperature: of the similarities.
    """
    logits = met.anchors @ candidates.T / temperature
    same = (keys == keys[right, None]) | (keys == met.anchor_keys[:, None])
    same.scatter_(1, right[:, None], False)  # its own positive stays
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), right, reduction="none")
