"""What a model of speech writes, while it is in training and under every strategy, and how much of it is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.error_rates import error_counts
from toolkit.strategies import Strategy
from toolkit.tasks import Batch, SpeechRecognition, Task
from toolkit.tasks.speech import SpeechBatch

SHOWN = 8
"""The first samples of a split, whose transcripts are kept."""


@dataclass(frozen=True)
class Rules:
    """How a model writes.

    Attributes:
        prefix: tokens that it begins with.
        end: the token that it ends with.
        never: tokens that it may not write.
        not_first: nor as the first one.
        tokens: of a transcript at most, prefix included.
    """

    prefix: tuple[int, ...]
    end: int
    never: tuple[int, ...]
    not_first: tuple[int, ...]
    tokens: int


def rules_of(model: Any, processor: Any) -> Rules:
    """Those that a Whisper model comes with; marks of time, for which its tokenizer has no names, are not written."""
    generation, tokenizer = model.generation_config, processor.tokenizer
    nameless = range(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size)
    return Rules(
        prefix=tuple(tokenizer.prefix_tokens),
        end=tokenizer.eos_token_id,
        never=(*(generation.suppress_tokens or ()), *nameless),
        not_first=tuple(generation.begin_suppress_tokens or ()),
        tokens=model.config.max_target_positions,
    )


@torch.no_grad()
def write_out(
    strategy: Strategy, encoded: torch.Tensor, rules: Rules, on_token: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """The likeliest token, one after the other, of each recording. Collective: all ranks write equally many.

    Args:
        strategy: holds the model.
        encoded: what the encoder made of the recordings, (B, positions, width).
        rules: how the model writes.
        on_token: called before each forward.

    Returns:
        Tokens of each behind the prefix, without the end.
    """
    rows = torch.tensor([rules.prefix] * len(encoded), device=encoded.device)
    over = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    cache: Any = None
    for number in range(rules.tokens - len(rules.prefix)):
        on_token()
        inputs: dict[str, Any] = {
            "encoder_outputs": (encoded,),
            "decoder_input_ids": rows if cache is None else rows[:, -1:],
            "past_key_values": cache,
            "use_cache": True,
        }
        outputs = strategy.forward(inputs)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1].float()
        logits[:, [*rules.never, *(rules.not_first if number == 0 else ())]] = -torch.inf
        tokens = logits.argmax(-1).where(~over, rules.end)
        rows, over = torch.cat([rows, tokens[:, None]], dim=1), over | (tokens == rules.end)
        if not strategy.world.sum((~over).sum()):
            break
    written = rows[:, len(rules.prefix) :].tolist()
    return [list(itertools.takewhile(lambda token: token != rules.end, row)) for row in written]


class Transcription(Task):
    """A task that is evaluated on what the model writes by itself, too: word and character error rates.

    Each recording is transcribed once, by the rank that has it. The error rates are computed of normalised texts (see
    `error_rates`), and their counts add up.

    Args:
        task: whose loss is measured on the way.
        strategy: holds the model.
        rules: how the model writes.
        tokenizer: of the model.
        on_token: called before each forward that writes a token.
    """

    unit = "tokens"

    def __init__(
        self,
        task: SpeechRecognition,
        strategy: Strategy,
        rules: Rules,
        tokenizer: Any,
        on_token: Callable[[], None] = lambda: None,
    ) -> None:
        self.task, self.strategy, self.rules, self.tokenizer, self.on_token = task, strategy, rules, tokenizer, on_token
        self._transcripts: list[tuple[int, str, str]] = []

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        """As the task."""
        return self.task.collate(rows, empty)

    def units(self, batch: Batch) -> int:
        """As the task."""
        return self.task.units(batch)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """As the task."""
        return self.task.loss(outputs, batch)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """What the task counts; errors and numbers of words and characters."""
        assert isinstance(batch, SpeechBatch)
        written = write_out(self.strategy, outputs.encoder_last_hidden_state, self.rules, self.on_token)
        found = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in written[: len(batch.ids)]]
        transcripts = zip(batch.ids, batch.texts, found, strict=True)
        self._transcripts += [transcript for transcript in transcripts if transcript[0] < SHOWN]
        counts = error_counts(batch.texts, found)
        device = batch.labels.device
        told = {name: torch.tensor(count, dtype=torch.float64, device=device) for name, count in counts.items()}
        return self.task.measure(outputs, batch) | told

    def metrics(self, counts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The task's figures; `wer` and `cer`; `transcripts`, the first ones. Collective."""
        gathered = itertools.chain.from_iterable(self.strategy.world.gather(self._transcripts))
        self._transcripts = []
        shown = [{"id": id_, "said": said, "heard": heard} for id_, said, heard in sorted(gathered)]
        return self.task.metrics(counts) | {
            "wer": float(counts["word_errors"] / counts["words"]),
            "cer": float(counts["character_errors"] / counts["characters"]),
            "transcripts": shown,
        }


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Lines that hold the transcripts of two evaluations against each other: what was said, and what was heard."""
    pairs = zip(before["transcripts"], after["transcripts"], strict=True)
    told = [(old["said"], old["heard"], new["heard"]) for old, new in pairs]
    return [f"said:   {said}\nbefore: {old}\nafter:  {new}\n" for said, old, new in told]
