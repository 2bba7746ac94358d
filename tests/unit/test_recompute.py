"""Activation checkpointing: the same numbers to the bit, less that is kept, and blocks that are computed twice."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.parity.job import tiny_bert
from toolkit.compute import (
    checkpoint_activations,
    compile_blocks,
    fuse_loss,
    keep_less,
    remove_padding,
    replace_dropout,
)
from toolkit.compute.padding_free import short_texts
from toolkit.compute.recompute import check_checkpointing
from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks
from toolkit.precision import Reduced

SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "bert": lambda: tiny_bert(dropout=0.3),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, n_positions=32)),
}


def model_of(name: str, kind: str, *, free: bool = True) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    model.config.use_cache = False  # which goes through other kernels, and checkpointing turns it off
    replace_dropout(model)
    keep_less(model)
    if free:
        assert remove_padding(model) == ""
    if kind != "none":
        assert checkpoint_activations(model, kind) == len(repeated_blocks(model))
    return model


def step(model: Any, reduced: Reduced | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one batch, and then of another: state of the first must not get into the second."""
    inputs = short_texts(model.config)
    for number in (1, 2):
        model.zero_grad()
        torch.manual_seed(number)
        batch = inputs | {"input_ids": (inputs["input_ids"] * number) % 97}
        logits = (reduced.forward(batch) if reduced else model(**batch))[0]
        loss = logits.float().square().mean()
        reduced.backward(loss) if reduced else loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["selective", "full", "offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("free", [True, False], ids=["no padding", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_to_the_bit(name: str, free: bool, dtype: torch.dtype, kind: str) -> None:
    found = []
    for each in ("none", kind):
        model = model_of(name, each, free=free)
        found.append(step(model, Reduced(model, dtype) if dtype != torch.float32 else None))
    (loss, gradients), (again, others) = found
    assert loss == again
    assert len(gradients) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def kept_bytes(model: Any) -> int:
    """Of all tensors that are kept for backward, each storage once; not of parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(2, 100, (4, 24), generator=torch.Generator().manual_seed(0))
    alive = []
    with saved_tensors_hooks(lambda t: (alive.append(t), note(t))[1], lambda t: t):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(kept.values())


def test_less_is_kept() -> None:
    """By these hooks the tensors that blocks keep are seen, but for what `selective` holds in a place of its own."""
    none, full = (kept_bytes(model_of("llama", kind)) for kind in ("none", "full"))
    assert full < none / 3


@pytest.mark.parametrize("kind", ["full", "offload"])
def test_whether_the_inputs_of_blocks_are_held_where_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy stands for what would be in the memory of the host: on a CPU, torch leaves there what is there."""
    monkeypatch.setattr(
        "toolkit.compute.recompute.save_on_cpu", lambda pin_memory: saved_tensors_hooks(torch.clone, lambda t: t)
    )
    model = model_of("llama", kind)
    model.config._attn_implementation = "eager"
    inputs: list[Any] = []
    for block in repeated_blocks(model)[1:]:
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    loss = model(**short_texts(model.config)).logits.float().square().mean()
    held = [one() is not None for one in inputs]
    assert held == [kind == "full"] * 2
    loss.backward()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_offloading_needs_somewhere_to_go(device: str) -> None:
    refused = pytest.raises(ConfigError, match="no effect on CPU ranks")
    with refused if device == "cpu" else contextlib.nullcontext():
        check_checkpointing("offload", True, "zero3", torch.device(device))


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_what_is_computed_twice(kind: str) -> None:
    model = model_of("llama", kind)
    layer = repeated_blocks(model)[1]
    calls = {"norm": 0, "block": 0}
    layer.input_layernorm.register_forward_hook(lambda *_: calls.update(norm=calls["norm"] + 1))
    layer.register_forward_hook(lambda *_: calls.update(block=calls["block"] + 1))
    step(model)
    assert calls == {"norm": 2 if kind == "none" else 4, "block": 2}, "two batches"
    calls["norm"] = 0
    with torch.no_grad():
        model(**short_texts(model.config))
    assert calls["norm"] == 1, "nothing is kept, so nothing is computed again"


def test_selective_computes_no_product_again() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for kind in ("none", "selective", "full"):
        model = model_of("llama", kind, free=False)
        with FlopCounterMode(display=False) as counter:
            step(model)
        flops[kind] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"] <= flops["none"] * 4 / 3


def test_with_a_fused_loss_and_compiled_blocks() -> None:
    losses = []
    for kind in ("none", "full"):
        torch.manual_seed(0)
        model = MODELS["llama"]().train()
        assert fuse_loss(model) == ""
        assert remove_padding(model) == ""
        if kind == "full":
            compile_blocks(model, torch.device("cpu"))
            checkpoint_activations(model, "full")
        inputs = short_texts(model.config)
        loss = model(**inputs, labels=inputs["input_ids"]).logits.sum()
        loss.backward()
        losses.append(float(loss.detach()))
        losses.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


def test_names_of_weights_stay() -> None:
    assert list(model_of("bert", "full").state_dict()) == list(tiny_bert().state_dict())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no repeated blocks"):
        checkpoint_activations(nn.Linear(2, 2), "full")
