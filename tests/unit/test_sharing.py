"""A model that the ranks of a node hold once."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.ranks import on_ranks
from tests.recipes.conftest import tiny_model
from toolkit.config import ModelConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.models import load_classifier, origin_of
from toolkit.optim import OptimConfig, adamw
from toolkit.precision import choose_precision
from toolkit.sharing import once_a_node, stop_offering
from toolkit.strategies import choose_strategy
from toolkit.world import world

__all__ = ["tiny_model"]

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the memory is Linux's")

LABELS = ["a", "b", "c"]
LARGE = 2**20
"""Elements of a weight that cannot be taken for noise."""


def mapped() -> dict[str, int]:
    """The KiB of this process on memory of that kind: `Rss`, and what is its own, `Anonymous`."""
    found = {"Rss": 0, "Anonymous": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/memfd:" in line
        elif ours and (key := line.partition(":")[0]) in found:
            found[key] += int(line.split()[1])
    return found


class Net(nn.Module):
    """With a weight in two places, one that is frozen, and a buffer of each kind."""

    def __init__(self, pid: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(1024, LARGE // 1024, bias=False)
        self.tied = nn.Linear(1024, LARGE // 1024, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3, dtype=torch.float64), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scratch", torch.tensor(2.5), persistent=False)
        self.pid = pid


def build() -> Net:
    torch.manual_seed(3)
    return Net(os.getpid())


def share(size: int) -> dict[str, Any]:
    model = once_a_node("net", build)
    world().connect()
    builders = set(world().gather(model.pid))
    drawn = torch.rand(1).item()
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    before = mapped()
    if world().main:
        model.first.weight.data.add_(1)
    world().gather(None)
    stop_offering()
    found = {
        "builders": len(builders),
        "drawn": drawn,
        "before": before,
        "state": state,
        "tied": model.tied.weight is model.first.weight,
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "scratch": model.scratch.item(),
        "changed": not np.array_equal(model.first.weight.data.numpy(), state["first.weight"]),
        "own": mapped()["Anonymous"],
    }
    del model.first, model.tied, model.frozen
    return found | {"left": mapped()["Rss"]}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_hold_one_model_until_they_change_it(size: int) -> None:
    expected = build()
    drawn = torch.rand(1).item()
    weight = LARGE * 4 // 1024
    for rank, found in enumerate(on_ranks(share, size, size)):
        assert found["builders"] == 1
        assert found["state"].keys() == expected.state_dict().keys()
        assert all(
            np.array_equal(found["state"][name], tensor.numpy()) for name, tensor in expected.state_dict().items()
        )
        assert found["tied"]
        assert found["trained"] == ["empty", "first.weight"]
        assert found["scratch"] == 2.5
        assert found["drawn"] == drawn
        assert found["before"]["Anonymous"] == 0
        assert found["before"]["Rss"] >= (weight if size > 1 else 0)
        assert found["changed"] == (rank == 0)
        assert found["own"] // weight == (1 if rank == 0 and size > 1 else 0), "whole pages"
        assert found["left"] == 0


def build_with_a_function() -> Net:
    model = build()
    model.hook = lambda: None
    return model


def share_what_cannot_be() -> tuple[int, int, Any]:
    model = once_a_node("net with a function", build_with_a_function)
    return model.pid, os.getpid(), model.first.weight.detach().numpy()


def test_what_cannot_be_taken_apart_each_rank_builds() -> None:
    found = on_ranks(share_what_cannot_be, 2)
    assert [built == own for built, own, _ in found] == [True, True]
    assert all(np.array_equal(weight, build().first.weight.detach().numpy()) for _, _, weight in found)


def build_and_die() -> Net:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def share_after_a_kill() -> tuple[int, bool]:
    child = os.fork()
    if not child:
        once_a_node("killed", build_and_die)
        os._exit(0)  # the other rank was there before
    _, status = os.waitpid(child, 0)
    return status, torch.equal(once_a_node("killed", build).first.weight, build().first.weight)


def test_one_that_is_killed_while_it_builds_holds_nobody_up() -> None:
    (first, _), (second, _) = found = on_ranks(share_after_a_kill, 2, timeout=30)
    assert signal.SIGKILL in (first, second)
    assert [right for _, right in found] == [True, True]


def offer_and_end() -> list[bool]:
    """One that offered, and ended; then one more that finds its note. The other rank keeps out of it."""
    if os.environ["RANK"] != "0":
        return []
    child = os.fork()
    if not child:
        once_a_node("ended", build)
        os._exit(0)
    os.waitpid(child, 0)
    folder = Path(tempfile.gettempdir(), f"largemodel-toolkit-{os.getuid()}")
    noted = any(json.loads(path.read_text())["process"] == child for path in folder.glob("*.json"))
    return [noted, once_a_node("ended", build).pid == os.getpid()]


def test_the_note_of_one_that_ended_is_of_no_use() -> None:
    assert on_ranks(offer_and_end, 2) == [[True, True], []]


def lay(name: str, folder: str) -> tuple[Any, int, int, bool]:
    model = load_classifier(ModelConfig(name=folder, init="random"), LABELS, seed=1)
    world().connect()
    before = mapped()["Rss"]
    digest = sum(p.double().sum().item() for p in model.parameters())
    stop_offering()
    options = {"world": world(), "precision": choose_precision("fp32", world()), "shape": batch_shape(2, 1, 2)}
    strategy = choose_strategy(StrategyConfig(name=name), max_grad_norm=None, **options)
    origin = origin_of(model)
    strategy.setup(model, lambda wrapped: adamw(wrapped, OptimConfig(), 1.0))
    del model
    after = mapped()["Rss"]
    strategy.teardown()
    return digest, before, after, origin is not None and origin.init == "random"


@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_nothing_is_left_of_it_when_the_ranks_hold_shards(name: str, tiny_model: Path) -> None:
    first, second = on_ranks(lay, 2, name, str(tiny_model))
    assert first[0] == second[0]
    for _, before, after, known in (first, second):
        assert before > 0
        assert after == 0
        assert known
