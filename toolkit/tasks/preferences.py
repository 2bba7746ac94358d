"""Of two answers the one that is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

from toolkit.compute.cross_entropy import IGNORED
from toolkit.errors import ConfigError
from toolkit.tasks.base import Batch
from toolkit.tasks.language_modeling import LanguageModeling, TextBatch

PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo"]
REFERENCE_FREE = ("orpo",)
"""Losses that ask only what the model itself thinks of the answers."""


@dataclass
class PairBatch(TextBatch):
    """Two texts for each pair, the one with the preferred answer first.

    Attributes:
        pairs: numbers of the pairs among those of all splits; none for the filler.
    """

    pairs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Thought:
    """What model and reference think of the answers of some pairs.

    Attributes:
        answers: log-probability of the preferred answer and of the other under the model, (pairs, 2) in fp32.
        reference: the same under the reference.
        lengths: tokens of both.
    """

    answers: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor

    @property
    def log_ratios(self) -> torch.Tensor:
        """By how much each answer has become more probable than under the reference, (pairs, 2)."""
        return self.answers - self.reference

    @property
    def per_token(self) -> torch.Tensor:
        """Mean log-probability of a token of each answer, (pairs, 2)."""
        return self.answers / self.lengths


class Preferences(LanguageModeling):
    """The loss of pairs of answers, of which one is preferred; how large the margin is, and how often it is right.

    A sample is two pieces, the question with the preferred answer and with the other one, of which the tokens of the
    answers are marked as `trained`, and its `number` among all. `reference` is to be set before
    training, from the table of `Scores`.

    Args:
        tokenizer, vocabulary, positions: as in `LanguageModeling`.
        fused: the model gives the loss of each text instead of logits where it is given labels (`fuse_loss`).
        loss: `dpo` (Rafailov et al. 2023, equation 7), `ipo` (Azar et al. 2023, equation 17, with log-probabilities
            per token), `kto` (Ethayarajh et al. 2024, equation 8, of both answers, with a reference point of 0), or
            `orpo` (Hong et al. 2024, equations 6 and 7).
        beta: how dear it is to leave the reference (dpo, kto), half of the inverse of the margin to be reached (ipo),
            or the weight of the odds ratio beside the likelihood of the preferred answer (orpo).
        label_smoothing: share of pairs whose preference is thought to be the wrong way round; for dpo alone (Mitchell
            2023, conservative DPO).
        pairs: number of all pairs, in all splits.

    Attributes:
        reference: (pairs, 2) in fp64, log-probabilities under the reference by `number`. None while they are not
            known: the model is then its own reference, as before the first step.

    Raises:
        ConfigError: label smoothing for a loss that has none.
    """

    unit = "pairs"

    def __init__(
        self,
        tokenizer: Any,
        *,
        loss: PreferenceLoss,
        beta: float,
        pairs: int,
        label_smoothing: float = 0.0,
        vocabulary: int,
        positions: int | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__(tokenizer, vocabulary=vocabulary, positions=positions, fused=fused)
        self.name: PreferenceLoss = loss
        self.beta = beta
        self.pairs = pairs
        self.label_smoothing = label_smoothing
        self.smooths_labels = loss == "dpo"
        self.reference: torch.Tensor | None = None
        if label_smoothing and loss != "dpo":
            raise ConfigError(f"--train.label_smoothing has no effect on the loss {loss}", "Leave it at 0.")

    def describe(self) -> dict[str, str]:
        """Lines of the plan."""
        against = "nothing" if self.name in REFERENCE_FREE else "the model before training, computed once"
        return {"loss": f"{self.name}, beta {self.beta:g}", "held against": against}

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> PairBatch:
        """As of texts, two for each pair."""
        texts = super().collate(rows, empty)
        return PairBatch(**vars(texts), pairs=[] if empty else list(rows["number"]))

    def problem(self, row: Mapping[str, Any]) -> str:
        """As of texts; or it is no pair."""
        return super().problem(row) or ("" if len(row["pieces"]) == 2 else "it is not two answers")

    def title(self, batch: Batch, row: int) -> str:
        """Which answer of its pair it has."""
        return "the other answer" if row % 2 else "the preferred answer"

    def units(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.ids)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Summed over the pairs."""
        if not batch.ids:
            return 0 * self._of_texts(outputs, batch).sum()
        return self._losses(self._thought(outputs, batch), self.label_smoothing).sum()

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses, rewards, margins, and how often the preferred answer is ahead; see `metrics`."""
        names = ("loss", "chosen", "rejected", "right", "likelier", "units")
        if not batch.ids:
            return {name: torch.zeros((), dtype=torch.float64, device=batch.labels.device) for name in names}
        thought = self._thought(outputs, batch)
        rewards = self._rewards(thought)
        found = (
            self._losses(thought, 0.0),
            *rewards.unbind(1),
            _ahead(rewards),
            _ahead(thought.per_token),
            torch.ones_like(rewards[:, 0]),
        )
        return {name: values.double().sum() for name, values in zip(names, found, strict=True)}

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Means over the pairs.

        `chosen_reward`, `rejected_reward`: β times the log-ratio to the reference; for losses without one, β times the
        log-odds of a token. `reward_margin`: their difference. `reward_accuracy`: how often the preferred answer has
        the larger one, a tie counting half. `likelier`: how often it has the more probable tokens, under the model
        alone.
        """
        units = float(counts["units"])
        mean = {name: float(counts[name]) / units for name in counts if name != "units"}
        return {
            "loss": mean["loss"],
            "reward_margin": mean["chosen"] - mean["rejected"],
            "reward_accuracy": mean["right"],
            "likelier": mean["likelier"],
            "chosen_reward": mean["chosen"],
            "rejected_reward": mean["rejected"],
            "units": int(units),
        }

    def log_probabilities(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Of both answers of each pair, (pairs, 2) in fp32."""
        return -self._of_texts(outputs, batch).view(-1, 2)

    def _of_texts(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of each text, summed over its answer: (texts,) in fp32."""
        logits: torch.Tensor = outputs.logits
        if self.fused:
            return logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view_as(batch.labels).sum(1)

    def _thought(self, outputs: Any, batch: Batch) -> Thought:
        assert isinstance(batch, PairBatch)
        found = self.log_probabilities(outputs, batch)
        lengths = (batch.labels != IGNORED).sum(1).view(-1, 2)
        if self.name in REFERENCE_FREE:
            return Thought(found, torch.zeros_like(found), lengths)
        reference = found.detach() if self.reference is None else self.reference[batch.pairs].to(found)
        return Thought(found, reference, lengths)

    def _losses(self, thought: Thought, label_smoothing: float) -> torch.Tensor:
        """(pairs,)"""
        beta = self.beta
        if self.name == "orpo":
            odds = _log_odds(thought.per_token)
            return -thought.per_token[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        if self.name == "ipo":
            chosen, rejected = (thought.log_ratios / thought.lengths).unbind(1)
            return (chosen - rejected - 1 / (2 * beta)) ** 2
        chosen, rejected = thought.log_ratios.unbind(1)
        if self.name == "kto":
            return (2 - torch.sigmoid(beta * chosen) - torch.sigmoid(-beta * rejected)) / 2
        margin = beta * (chosen - rejected)
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)

    def _rewards(self, thought: Thought) -> torch.Tensor:
        """(pairs, 2)"""
        return self.beta * (_log_odds(thought.per_token) if self.name in REFERENCE_FREE else thought.log_ratios)


class Scores(Preferences):
    """Keeps the log-probabilities of the answers that this rank meets; to be evaluated in the place of `task`.

    Attributes:
        table: (pairs, 2) in fp64; 0 for those that have not been met.
        seen: (pairs, 1) in fp64; 1 for those that have.
    """

    def __init__(self, task: Preferences) -> None:
        vars(self).update(vars(task))
        self.table = torch.zeros(task.pairs, 2, dtype=torch.float64)
        self.seen = torch.zeros(task.pairs, 1, dtype=torch.float64)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Nothing is counted but pairs."""
        assert isinstance(batch, PairBatch)
        if batch.pairs:
            self.table[batch.pairs] = self.log_probabilities(outputs, batch).double().cpu()
            self.seen[batch.pairs] = 1
        device = batch.labels.device
        return {"units": torch.tensor(float(len(batch.ids)), dtype=torch.float64, device=device)}

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The number of pairs."""
        return {"units": int(counts["units"])}


def _ahead(values: torch.Tensor) -> torch.Tensor:
    """1 for each pair of which the first is larger, a half where they are equal."""
    return (torch.sign(values[:, 0] - values[:, 1]) + 1) / 2


def _log_odds(log_probabilities: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)), finite for p = 1 too."""
    almost = log_probabilities.clamp(max=-torch.finfo(torch.float32).eps)
    return almost - torch.log(-torch.expm1(almost))
