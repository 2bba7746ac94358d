"""What a model in training writes, under every strategy: behind a few prompts, or for each sample of a split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from toolkit.config import DecodeConfig
from toolkit.encoder_decoders import language_token, start_token
from toolkit.errors import ConfigError
from toolkit.strategies import Strategy
from toolkit.tasks import PairBatch


@dataclass(frozen=True)
class Written:
    """What a model wrote for a sample.

    Attributes:
        id: of the sample.
        source: what it was given.
        target: what was wanted.
        text: what it wrote, without special tokens.
    """

    id: int
    source: str
    target: str
    text: str


def beginning(text: str, tokenizer: Any) -> list[int]:
    """A text to go on with, as tokens: behind the one that begins a text, or ends the one before."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def continue_texts(
    strategy: Strategy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    tokens: int,
    temperature: float,
    seed: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[str]:
    """What follows each prompt, up to a token that ends it or `tokens` tokens. Collective; alike on every rank.

    Each token is a forward over all that is there: sharded models have nowhere to keep keys and values, and all ranks
    must run the same forwards. Rank 0 chooses.

    Args:
        strategy: holds the model.
        tokenizer: of the model.
        prompts: tokens of each, at least one.
        ends: tokens that end a text, or an answer.
        tokens: at most so many for each.
        temperature: of the distribution that is drawn from; 0 takes the likeliest token.
        seed: of what is drawn.
        on_token: called before each forward.
    """
    rows = [list(prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    over = [False] * len(rows)
    generator = torch.Generator().manual_seed(seed)
    strategy.set_training(False)
    for _ in range(tokens):
        on_token()
        lengths = torch.tensor([len(row) for row in rows])
        there = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.full(there.shape, min(ends))
        padded[there] = torch.tensor([token for row in rows for token in row])
        inputs = {"input_ids": padded, "attention_mask": there.long()}
        logits = strategy.forward({name: value.to(strategy.world.device) for name, value in inputs.items()}).logits
        last = logits[torch.arange(len(rows)), lengths - 1].float().cpu()
        drawn = strategy.world.on_main(partial(_draw, last, temperature, generator))
        for number, token in enumerate(drawn):
            if not over[number]:
                rows[number].append(token)
                over[number] = token in ends
        if all(over):
            break
    return [tokenizer.decode(row[start:], skip_special_tokens=True) for row, start in zip(rows, starts, strict=True)]


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(-1).tolist()
    chances = torch.softmax(logits / temperature, -1)
    return torch.multinomial(chances, 1, generator=generator).squeeze(1).tolist()


def write_as(
    model: nn.Module, tokenizer: Any, config: DecodeConfig, *, tokens: int, ends: Collection[int] = ()
) -> None:
    """Let a model, and all that load what is saved of it, write in this way and no other; nothing is drawn.

    Args:
        model: an encoder–decoder, or a decoder.
        tokenizer: of the model.
        config: with how many beams.
        tokens: of a text, at most.
        ends: tokens that end a text, beside the tokenizer's own.

    Raises:
        ConfigError: a length penalty without beams.
    """
    penalty = config.length_penalty
    if penalty is not None and config.beams == 1:
        raise ConfigError(
            f"--generate.length_penalty {penalty:g} has no effect on one beam",
            "Drop it, or set --generate.beams.",
        )
    described: Any = model
    encodes = described.config.is_encoder_decoder
    language = language_token(tokenizer) if encodes else None
    described.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=config.beams,
        length_penalty=1.0 if penalty is None else penalty,
        max_new_tokens=tokens,
        eos_token_id=sorted({*_listed(tokenizer.eos_token_id), *_listed(described.config.eos_token_id), *ends}),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **({"decoder_start_token_id": start_token(model)} if encodes else {}),
        **({} if language is None else {"forced_bos_token_id": language}),
    )


@torch.no_grad()
def write_each(
    strategy: Strategy,
    batches: Iterable[PairBatch],
    tokenizer: Any,
    *,
    beams: int | None = None,
    on_token: Callable[[], None] = lambda: None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[Written]:
    """What the model writes for each sample, in the order of their ids. Collective; alike on every rank.

    Args:
        strategy: holds the model, which `write_as` has told how to write.
        batches: of this rank; every rank has as many, and each sample is in one of them.
        tokenizer: of the model.
        beams: another number than the model's own.
        on_token: called before each token of a batch.
        on_batch: called with the number of batches done, for progress.
    """
    strategy.set_training(False)
    described: Any = strategy.module
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([_Watched(on_token)])}
    if beams is not None:
        options["num_beams"] = beams
    written: list[Written] = []
    for done, batch in enumerate(batches, start=1):
        inputs = {name: value.to(strategy.world.device) for name, value in batch.prompts.items()}
        found = strategy.generate(inputs, **options)
        if not described.config.is_encoder_decoder:
            found = found[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(found.tolist(), skip_special_tokens=True)
        samples = zip(batch.ids, batch.sources, batch.targets, texts, strict=False)  # a filler has no id
        written += [Written(id_, source, target, text.strip()) for id_, source, target, text in samples]
        on_batch(done)
    every = itertools.chain.from_iterable(strategy.world.gather(written))
    return sorted(every, key=lambda one: one.id)


def _listed(token: int | list[int] | None) -> list[int]:
    return [] if token is None else [token] if isinstance(token, int) else token


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; tells that another token is there."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
