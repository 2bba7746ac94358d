"""What is said in a recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from toolkit.compute.cross_entropy import IGNORED
from toolkit.data.audio import RATE
from toolkit.data.spec_augment import SpecAugment
from toolkit.tasks.base import Batch, Task, problem_of_tokens


@dataclass
class SpeechBatch(Batch):
    """Recordings of one micro-batch.

    Attributes:
        texts: what is said in each; none for a filler.
    """

    texts: list[str] = field(default_factory=list)


class SpeechRecognition(Task):
    """Cross-entropy of the next token of a text, given the log-mel spectrogram of its recording.

    Spectrograms are computed where batches are collated. In training, and nowhere else, a part of each is blanked out.

    Args:
        processor: the tokenizer and the feature extractor of the model.
        vocabulary: number of token ids that the model has an embedding for.
        positions: tokens that the decoder takes.
        augment: what is blanked out in training.
        label_smoothing: share of the target spread over all tokens, in training only.
    """

    unit = "tokens"
    smooths_labels = True

    def __init__(
        self,
        processor: Any,
        *,
        vocabulary: int,
        positions: int,
        augment: SpecAugment,
        label_smoothing: float = 0.0,
    ) -> None:
        self.extractor = processor.feature_extractor
        self.prefix: list[int] = list(processor.tokenizer.prefix_tokens)
        self.end: int = processor.tokenizer.eos_token_id
        self.vocabulary, self.positions = vocabulary, positions
        self.augment = augment
        self.label_smoothing = label_smoothing

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> SpeechBatch:
        """`input_features` (B, mel bands, frames of the window), `decoder_input_ids` (B, L), labels (B, L).

        The label of a position is the token after it; the prefix, which says what to write, is given and not learnt.
        Padding needs no mask: it comes behind the text, and the decoder looks back alone.
        """
        heard = [np.frombuffer(content, "<i2").astype(np.float32) / 32768 for content in rows["audio"]]
        features = self.extractor(heard, sampling_rate=RATE, return_tensors="pt").input_features
        if "epoch" in rows:
            frames = [-(-len(samples) // self.extractor.hop_length) for samples in heard]
            for clip, count, epoch, sample in zip(features, frames, rows["epoch"], rows["id"], strict=True):
                self.augment.apply(clip, count, epoch, sample)
        longest = max(map(len, rows["tokens"]))
        tokens = torch.tensor([[*ids, *[self.end] * (longest - len(ids))] for ids in rows["tokens"]])
        places, lengths = torch.arange(1, longest), torch.tensor([len(ids) for ids in rows["tokens"]])
        learnt = (places >= len(self.prefix)) & (places < lengths[:, None]) & (not empty)
        return SpeechBatch(
            inputs={"input_features": features, "decoder_input_ids": tokens[:, :-1]},
            labels=tokens[:, 1:].where(learnt, IGNORED),
            weights=torch.zeros(len(heard)) if empty else torch.ones(len(heard)),
            ids=[] if empty else list(rows["id"]),
            texts=[] if empty else list(rows["text"]),
        )

    def problem(self, row: Mapping[str, Any]) -> str:
        """No sound or too much of it, no tokens, too many, or one without an embedding."""
        size = len(row["audio"] or b"")
        if not size or size % 2:
            return "it has no sound"
        if size // 2 > self.extractor.n_samples:
            return f"it has {size / 2 / RATE:.1f} seconds, of which the model hears {self.extractor.chunk_length}"
        return problem_of_tokens(row["tokens"], self.vocabulary, self.positions)

    def units(self, batch: Batch) -> int:
        """Tokens that are learnt."""
        return int((batch.labels != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Smoothed cross-entropy, summed over the tokens."""
        return self._cross_entropy(outputs, batch, self.label_smoothing)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Plain cross-entropy and number of tokens."""
        return {
            "loss": self._cross_entropy(outputs, batch, 0.0).double(),
            "units": (batch.labels != IGNORED).sum().double(),
        }

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The mean loss of a token."""
        units = float(counts["units"])
        return {"loss": float(counts["loss"]) / units, "units": int(units)}

    @staticmethod
    def _cross_entropy(outputs: Any, batch: Batch, label_smoothing: float) -> torch.Tensor:
        return F.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            batch.labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
