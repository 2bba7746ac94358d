"""How far a run has come: all that its session remembers, which stands in the manifest of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """The JSON-able state of a run after an optimizer step, alike on all ranks.

    Attributes:
        step: optimizer steps done.
        epoch: of the last step, 0-based.
        samples: consumed by all ranks.
        loss: of the last step.
        baseline: metrics on the test split before training.
        evaluations: on the validation split, each with its `step`.
        texts: what the model wrote after them, each with its `step`, `prompt` and `text`.
        best_loss, best_step, stale: lowest validation loss, where it was, and evaluations since.
        seconds, training_seconds: of all attempts; with everything, and in steps alone.
        skipped_steps: by fp16's loss scaler.
        bad_rows: ids of the training samples that were left out as unfit, each once.
        recent_losses: those that a new one is compared with.
        left_out: steps that are not taken, and why.
        rewinds, rewound_to: how often the run went back, and to which step the last time.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    loss: float | None = None
    baseline: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    skipped_steps: int = 0
    bad_rows: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    rewinds: int = 0
    rewound_to: int | None = None

    @property
    def evaluated(self) -> int:
        """Step of the last evaluation."""
        return int(self.evaluations[-1]["step"]) if self.evaluations else 0

    def note_evaluation(self, figures: Mapping[str, Any]) -> None:
        """Enter an evaluation after the current step."""
        self.evaluations.append({"step": self.step, **figures})
        loss = figures["loss"]
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
        else:
            self.stale += 1

    def metrics(self) -> dict[str, float]:
        """The figures that belong to the current step."""
        found = {} if self.loss is None else {"loss": self.loss}
        if self.evaluations and self.evaluated == self.step:
            found |= {f"validation_{name}": value for name, value in self.evaluations[-1].items() if name != "step"}
        return found

    def report(self, seconds: float) -> dict[str, Any]:
        """The figures of the run so far, for its report."""
        return {
            "steps": self.step,
            "evaluations": self.evaluations,
            "texts": self.texts,
            "seconds": seconds,
            "samples_per_second": self.samples / self.training_seconds if self.training_seconds else 0.0,
            "skipped_steps": self.skipped_steps,
            "bad_rows": len(self.bad_rows),
            "left_out": self.left_out,
        }

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Progress:
        """What `state` gave; JSON has made texts of the keys of `left_out`."""
        progress = Progress(**state)
        progress.left_out = {int(step): reason for step, reason in progress.left_out.items()}
        return progress
