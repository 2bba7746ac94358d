"""What the plan says of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from toolkit import overview
from toolkit.world import Launcher, World


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "used", "ranks", "said"),
    [
        (4, 1, 1, {"threads": "1 on 4 cores; accelerate launch --num_cpu_threads_per_process 4 uses all"}),
        (4, 1, 2, {"threads": "2 on 4 cores; accelerate launch --num_cpu_threads_per_process 2 uses all"}),
        (2, 2, 1, {}),
        (2, 1, 2, {}),
        (1, 1, 2, {}),
    ],
)
def test_cores_that_lie_idle_are_told_of(
    cores: int, used: int, ranks: int, said: dict[str, str], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "cores_of_this_process", lambda: cores)
    torch.set_num_threads(used)
    assert overview._threads(World(0, ranks, 0, ranks, torch.device("cpu"), Launcher())) == said


def test_on_a_gpu_nothing_is_said_of_cores() -> None:
    assert overview._threads(World(0, 1, 0, 1, torch.device("cuda", 0), Launcher())) == {}
