"""Text that a model in training goes on with: a look at what it has learnt, under every strategy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from toolkit.strategies import Strategy


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
