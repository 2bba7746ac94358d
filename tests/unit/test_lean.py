"""Norms and gated layers that keep less: the numbers of the hub's own, and less that is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
)
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.unit.test_padding_free import twins
from tests.unit.test_recompute import kept_bytes
from toolkit.compute import keep_less, lean

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0},
}
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (LlamaConfig(**SIZES), 2 * 3 + 1),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), 2 * 5 + 1),  # queries and keys have norms
    "gemma3": (Gemma3TextConfig(**SIZES, head_dim=16), 2 * 7 + 1),  # and there is one before each sum
    "gpt2": (GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=1), 2),
}
PARTS: dict[str, nn.Module] = {
    "llama norm": LlamaRMSNorm(64),
    "t5 norm": T5LayerNorm(64),
    "gemma norm": Gemma3RMSNorm(64),
    "llama gated": LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=80)),
    "gemma gated": Gemma3MLP(Gemma3TextConfig(hidden_size=64, intermediate_size=80)),
    "gelu gated": LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=80, hidden_act="gelu")),
    "new gelu": NewGELUActivation(),
}
TO_THE_BIT = ("llama norm", "t5 norm", "gemma norm")


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The hub's own and the one that keeps less, with weights that are not those of the beginning."""
    theirs = copy.deepcopy(PARTS[name])
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    assert keep_less(ours) == 1
    return theirs.to(dtype), ours.to(dtype)


def through(module: nn.Module, values: torch.Tensor) -> list[torch.Tensor]:
    """What comes out, and the gradients of the input and the weights."""
    values = values.clone().requires_grad_()
    found: torch.Tensor = module(values)
    (found * torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)).sum().backward()
    return [found.detach(), *(one.grad for one in (values, *module.parameters()) if one.grad is not None)]


@pytest.fixture(params=[7 * 64, lean.PART], ids=["in parts", "at once"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "PART", request.param)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("name", PARTS)
def test_the_numbers_of_the_hub_in_fp32(name: str) -> None:
    theirs, ours = pair(name, torch.float32)
    values = torch.randn(3, 11, 64)
    wanted, found = through(theirs, values), through(ours, values)
    assert len(wanted) == len(found) == 2 + len(list(theirs.parameters()))
    assert name not in TO_THE_BIT or torch.equal(found[0], wanted[0])
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("name", PARTS)
def test_no_less_exact_than_the_hub_in_bf16(name: str) -> None:
    theirs, ours = pair(name, torch.bfloat16)
    values = torch.randn(3, 11, 64).bfloat16()
    exact = through(copy.deepcopy(theirs).double(), values.double())
    wanted, found = through(theirs, values), through(ours, values)
    assert name not in TO_THE_BIT or torch.equal(found[0], wanted[0])
    for one, other, true in zip(found, wanted, exact, strict=True):
        assert one.dtype == other.dtype
        assert float((one - true).norm()) <= 1.1 * float((other - true).norm())


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    config, count = MODELS[name]
    theirs, ours = twins(AutoModelForCausalLM, config)
    assert keep_less(ours) == count
    ids = torch.randint(2, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (ours, theirs):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5
    assert kept_bytes(ours.bfloat16()) < 0.85 * kept_bytes(theirs.bfloat16())


def test_an_encoder_and_its_decoder() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert keep_less(model) == 2 * 2 + 2 * 3 + 2, "its norms"


def test_what_is_frozen_has_no_gradient() -> None:
    _, norm = pair("llama norm", torch.float32)
    norm.requires_grad_(False)
    values = torch.randn(4, 64, requires_grad=True)
    norm(values).sum().backward()
    assert values.grad is not None
    assert norm.weight.grad is None
    assert not norm(values.detach()).requires_grad


class Length(LlamaRMSNorm):
    """To the length 1: another number than the root mean square."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states / (hidden_states.norm(dim=-1, keepdim=True) + self.variance_epsilon)


class Scaled(LlamaMLP):
    """A gated layer with something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Sparse(LlamaMLP):
    """And with another part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.share


@pytest.mark.parametrize(
    "module",
    [
        *(nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8), Length(8)),
        *(kind(LlamaConfig(hidden_size=32, intermediate_size=8)) for kind in (Scaled, Sparse)),
        LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act="relu2")),
        ACT2FN["gelu"],
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_something_else_stays(module: nn.Module) -> None:
    assert keep_less(module) == 0
    assert "forward" not in vars(module)
