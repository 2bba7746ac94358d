"""Compressed gradients: what is sent is smaller, all ranks agree, and what is carried along can begin anew."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from tests.parity.job import GLOBAL_BATCH, STEPS, Job, Outcome, Recording, tiny_bert, tiny_data, train
from tests.ranks import on_ranks
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Loader, batch_shape
from toolkit.engine import train_step
from toolkit.errors import ConfigError
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import Strategy, choose_strategy
from toolkit.world import World, world

START = 2
BF16 = {"compress": "bf16"}
POWERSGD = {"compress": "powersgd", "compress_rank": 2, "compress_start": START}


@functools.cache
def plain(accumulate: int = 1) -> Outcome:
    return on_ranks(train, 2, Job("ddp", accumulate=accumulate, steps=40, lr=2e-3))[0]


# bf16 keeps 8 significant bits of each gradient; of the 32 columns of a matrix, PowerSGD sends two.
@pytest.mark.parametrize(
    ("options", "apart", "accumulate"),
    [(BF16, 1e-3, 1), (POWERSGD, 0.1, 1), (POWERSGD, 0.1, 2)],
    ids=["bf16", "powersgd", "powersgd, accumulated"],
)
def test_training_stays_near_that_in_full(options: dict[str, Any], apart: float, accumulate: int) -> None:
    first, second = on_ranks(train, 2, Job("ddp", options, accumulate, steps=40, lr=2e-3))
    in_full = plain(accumulate).losses
    assert first.losses == second.losses
    assert first.losses != in_full, "nothing was compressed"
    assert first.losses == pytest.approx(in_full, rel=apart)
    assert first.losses[-1] < 0.7 * first.losses[0]


def test_what_is_in_force_is_read_from_the_hook() -> None:
    assert plain().effective["compress"] == "none"
    assert on_ranks(train, 2, Job("ddp", BF16, steps=3))[0].effective["compress"] == "bf16"
    effective = on_ranks(train, 2, Job("ddp", POWERSGD, steps=3))[0].effective
    assert (effective["compress"], effective["compress_rank"], effective["compress_start"]) == ("powersgd", 2, START)
    effective = on_ranks(train, 2, Job("ddp", {"compress": "powersgd"}, steps=3))[0].effective
    assert (effective["compress_rank"], effective["compress_start"]) == (4, 10)


def test_powersgd_begins_when_it_says() -> None:
    """The backward that lets torch deal out its buckets does not count; so the first steps equal those in full."""
    start = 3
    job, in_full = Job("ddp", POWERSGD | {"compress_start": start}), on_ranks(train, 2, Job("ddp"))[0].losses
    losses = on_ranks(train, 2, job)[0].losses
    assert losses[: start + 1] == in_full[: start + 1]
    assert losses[start + 1] != in_full[start + 1]


def connected() -> World:
    w = world()
    w.connect()
    return w


def set_up(w: World, options: dict[str, Any], model: nn.Module | None = None) -> Strategy:
    strategy = choose_strategy(
        StrategyConfig(name="ddp", **options),
        world=w,
        precision=Precision("fp32"),
        shape=batch_shape(GLOBAL_BATCH, None, w.size),
        max_grad_norm=None,
    )
    strategy.setup(model or tiny_bert(), lambda wrapped: adamw(wrapped, OptimConfig(lr=1e-3)))
    return strategy


def take(strategy: Strategy, first: int, last: int) -> list[float]:
    task = Recording()
    loader = Loader(tiny_data(), task.collate, strategy.shape, rank=strategy.world.rank, seed=5)
    losses = []
    for step in loader.steps(last, first):
        task.seen.append([])
        result = train_step(strategy, task, step, learning_rate=1e-3, seed=5)
        assert not result.fault
        losses.append(result.loss)
    return losses


def reduced_gradients(options: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """After enough steps, those of one more backward, which no update has cleared."""
    w = connected()
    strategy = set_up(w, options)
    take(strategy, 0, START)
    batch = Recording().collate(tiny_data()[w.rank * 4 : w.rank * 4 + 4], empty=False)
    with strategy.micro_batch(last=True):
        logits = strategy.forward(batch.inputs).logits
        strategy.backward(torch.nn.functional.cross_entropy(logits, batch.labels))
    found = {name: p.grad.numpy().copy() for name, p in strategy.module.named_parameters() if p.grad is not None}
    strategy.teardown()
    w.close()
    return found


def test_what_was_sent_is_bf16() -> None:
    for name, gradient in on_ranks(reduced_gradients, 2, BF16)[0].items():
        assert np.array_equal(torch.tensor(gradient).bfloat16().float().numpy(), gradient), name
    in_full = on_ranks(reduced_gradients, 2, {})[0].values()
    assert not all(np.array_equal(torch.tensor(g).bfloat16().float().numpy(), g) for g in in_full)


def test_what_was_sent_is_of_low_rank() -> None:
    compressed, in_full = (on_ranks(reduced_gradients, 2, options)[0] for options in (POWERSGD, {}))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert np.linalg.matrix_rank(compressed[name], rtol=1e-4) == 2
    assert np.linalg.matrix_rank(in_full[name], rtol=1e-4) > 8


def gone_back_and_resumed() -> list[list[float]]:
    """Losses after a gradient that is not finite and a way back to the state before, and those of a fresh start."""
    w = connected()
    rewound, fresh = set_up(w, POWERSGD), set_up(w, POWERSGD)
    take(rewound, 0, START + 2)
    kept = {name: shard.data.clone() for name, shard in rewound.shards().items()}
    batch = Recording().collate(tiny_data()[:4], empty=False)
    with rewound.micro_batch(last=True):
        rewound.backward(rewound.forward(batch.inputs).logits.sum() * float("nan"))
    assert not rewound.update(1e-3).applied
    losses = []
    for strategy in (rewound, fresh):
        for name, shard in strategy.shards().items():
            shard.data.copy_(kept[name])
        strategy.loaded()
        losses.append(take(strategy, START + 2, STEPS + 2))
        strategy.teardown()
    w.close()
    return losses


def test_who_goes_back_begins_anew_as_who_resumes() -> None:
    (rewound, fresh), on_the_other = on_ranks(gone_back_and_resumed, 2)
    assert np.isfinite(rewound).all()
    assert rewound == fresh
    assert on_the_other == [rewound, fresh]


def with_a_rank_that_lags_behind() -> tuple[list[float], int]:
    """The second rank reaches its second bucket late, when the first one's sums have begun to come in."""
    w = connected()
    config = tiny_bert().config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 512, 4
    torch.manual_seed(7)
    model = BertForSequenceClassification(config)
    strategy = set_up(w, POWERSGD, model)
    if w.rank == 1:
        model.bert.encoder.layer[0].output.dense.weight.register_hook(lambda gradient: time.sleep(0.1))
    losses = take(strategy, 0, START + 3)
    buckets = len(strategy.model._comm_hooks[0][1].error_dict)  # type: ignore[operator, union-attr, index]
    strategy.teardown()
    w.close()
    return losses, buckets


def test_ranks_add_up_what_belongs_together() -> None:
    first, second = on_ranks(with_a_rank_that_lags_behind, 2)
    assert first == second
    assert first[1] > 1, "there is nothing to get between"


def without_a_gradient(rank: int) -> list[float]:
    w, model = connected(), tiny_bert()
    norm = model.bert.encoder.layer[1].output.LayerNorm
    torch.nn.init.zeros_(norm.weight)
    norm.weight.requires_grad_(False)  # nothing reaches the matrices before it but zeros
    strategy = set_up(w, {"compress": "powersgd", "compress_rank": rank, "compress_start": 2}, model)
    losses = take(strategy, 0, 6)
    strategy.teardown()
    w.close()
    return losses


@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_of_zero_stay_finite(rank: int) -> None:
    assert np.isfinite(on_ranks(without_a_gradient, 2, rank)).all()


def refused_rank() -> str:
    try:
        set_up(connected(), {"compress": "powersgd", "compress_rank": 30})
    except ConfigError as error:
        return error.message
    return ""


def test_a_rank_that_makes_nothing_smaller_is_refused() -> None:
    assert on_ranks(refused_rank, 2) == ["--strategy.compress_rank 30 makes no matrix of this model smaller"] * 2
