"""AdamW in less memory: the numbers of torch's, what is kept in 8 bits, and that nothing is lost on the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.config import OptimConfig
from toolkit.errors import ConfigError
from toolkit.low_bit_optim import LowBitAdamW
from toolkit.optim import adamw, check_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(500, 64)
        self.wide = nn.Linear(64, 301)
        self.small = nn.Linear(301, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.small(torch.tanh(self.wide(self.table(ids))))
        return out


def steps(name: str, count: int = 30) -> tuple[Network, torch.optim.Optimizer, list[float]]:
    network = Network()
    optimizer = adamw(network, OptimConfig(name=name, lr=3e-3, weight_decay=0.1))  # type: ignore[arg-type]
    torch.manual_seed(1)
    losses = []
    for _ in range(count):
        ids = torch.randint(0, 500, (64,))
        loss = nn.functional.cross_entropy(network(ids), ids % 3)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return network, optimizer, losses


def low(optimizer: torch.optim.Optimizer) -> LowBitAdamW:
    assert isinstance(optimizer, LowBitAdamW)
    return optimizer


def bits(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    (found,) = {group["bits"] for group in optimizer.param_groups for p in group["params"] if p is parameter}
    return int(found)


def test_which_moments_have_8_bits() -> None:
    network, optimizer, _ = steps("adamw-8bit", 1)
    types = {name: optimizer.state[p]["exp_avg"].dtype for name, p in network.named_parameters()}
    assert {name for name, dtype in types.items() if dtype == torch.uint8} == {"wide.weight"}
    assert set(types.values()) == {torch.uint8, torch.float32}


def test_bytes() -> None:
    """Two moments of a byte each, and two numbers of fp32 for each block of 256."""
    network, optimizer, _ = steps("adamw-8bit", 1)
    large, blocks = network.wide.weight.numel(), -(-network.wide.weight.numel() // 256)
    rest = sum(p.numel() for p in network.parameters()) - large
    assert low(optimizer).state_bytes() == 2 * large + 8 * blocks + 8 * rest


def test_it_learns_as_torchs_does() -> None:
    full, _, expected = steps("adamw")
    network, _, losses = steps("adamw-8bit")
    assert expected[-1] < 0.8 * expected[0]
    assert losses == pytest.approx(expected, rel=0.01)
    assert losses != expected
    apart = (network.wide.weight - full.wide.weight).norm() / (full.wide.weight - Network().wide.weight).norm()
    assert 0 < apart < 0.1


def test_in_fp32_it_is_torchs() -> None:
    """Which the paged one is where a moment has no pages."""
    network, full = Network(), Network()
    ours = LowBitAdamW([{"params": list(network.parameters())}], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, paged=False)
    theirs = torch.optim.AdamW(full.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for number in range(5):
        for one, other in zip(network.parameters(), full.parameters(), strict=True):
            torch.manual_seed(number)
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, other in zip(network.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_given_out_and_taken_back_is_the_same() -> None:
    """To the bit, and so is the next step; blocks whose largest number is negative are among them."""
    network, optimizer, _ = steps("adamw-8bit")
    ours = low(optimizer)
    before = {p: {key: t.clone() for key, t in ours.state[p].items()} for p in network.parameters()}
    copies = [ours.copied(p, bits(ours, p)) for p in network.parameters()]
    assert all(copy["exp_avg"].dtype == torch.float32 and copy["exp_avg"].ndim == 1 for copy in copies)
    for parameter in network.parameters():
        ours.state[parameter]["exp_avg"].fill_(3)
        ours.state[parameter]["exp_avg_sq"].fill_(3)
    ours.put_back()
    for parameter, state in before.items():
        for key, tensor in state.items():
            assert torch.equal(ours.state[parameter][key], tensor), key


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_any_size_of_gradient_comes_back(scale: float) -> None:
    weights = nn.Parameter(torch.zeros(100, 131))
    ours = LowBitAdamW([{"params": [weights], "bits": 8}], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, paged=False)
    for number in range(3):
        torch.manual_seed(number)
        weights.grad = torch.randn(100, 131) * torch.logspace(-4, 0, 131) * scale
        ours.step()
    held = {key: tensor.clone() for key, tensor in ours.state[weights].items()}
    ours.copied(weights, 8)
    ours.put_back()
    assert all(torch.equal(ours.state[weights][key], tensor) for key, tensor in held.items())


def test_copies_are_of_the_last_step() -> None:
    network, optimizer, _ = steps("adamw-8bit", 1)
    ours, weights = low(optimizer), network.wide.weight
    first = ours.copied(weights, 8)["exp_avg"]
    assert ours.copied(weights, 8)["exp_avg"] is first
    ours.step()
    assert not torch.equal(ours.copied(weights, 8)["exp_avg"], first)


def test_a_state_before_the_first_step() -> None:
    network = Network()
    ours = low(adamw(network, OptimConfig(name="adamw-8bit")))
    state = ours.copied(network.wide.weight, 8)
    assert float(state["step"]) == 0
    assert not state["exp_avg"].any()
    ours.put_back()
    assert not ours.copied(network.wide.weight, 8)["exp_avg_sq"].any()


@pytest.mark.parametrize(
    ("name", "strategy", "device", "offloads", "words"),
    [
        ("paged-adamw", "ddp", CPU, False, "has no effect on cpu ranks.*Use --optim.name adamw\\."),
        ("paged-adamw-8bit", "ddp", CPU, False, "has no effect on cpu ranks.*Use --optim.name adamw-8bit\\."),
        ("paged-adamw", "zero2", GPU, True, "of what is offloaded"),
        ("adamw-8bit", "diloco", CPU, False, "DiLoCo averages the moments"),
    ],
)
def test_refused(name: str, strategy: str, device: torch.device, offloads: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        check_optimizer(OptimConfig(name=name), strategy, device, offloads=offloads)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "device"), [("adamw", CPU), ("adamw-8bit", CPU), ("paged-adamw-8bit", GPU)])
def test_allowed(name: str, device: torch.device) -> None:
    check_optimizer(OptimConfig(name=name), "fsdp", device, offloads=False)  # type: ignore[arg-type]
