"""Layers of low bits: which, what they compute, and what stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.parity.job import Recording, tiny_bert, tiny_data, tiny_gpt2, tiny_llama
from toolkit.adapters import adapter_of, add_adapter, fingerprint
from toolkit.compute import fuse_loss, remove_padding
from toolkit.config import AdapterConfig
from toolkit.errors import ConfigError
from toolkit.precision import Precision
from toolkit.probe import probe_gradients
from toolkit.quantization import (
    QUANTIZATIONS,
    LowBit,
    checksum,
    describe_quantization,
    is_quantized,
    quantize,
    round_weights,
    weight_bytes,
)

LOW = QUANTIZATIONS[1:]
IDS = torch.arange(2, 34).view(2, 16)


def quantized(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantized(module)}


def gradient_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    return gradient


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2])
def test_it_computes_with_the_rounded_weights(make: Any, name: str) -> None:
    model, rounded, plain = make().eval(), make().eval(), make().eval()
    layers = quantize(model, LowBit(name))
    round_weights(rounded, name)
    assert quantized(model) == set(layers) != set()
    with torch.no_grad():
        ours, theirs, exact = (m(input_ids=IDS).logits for m in (model, rounded, plain))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 1e-4 < float((ours - exact).abs().max()) < 0.3 * float(exact.abs().max())


def test_none_changes_nothing() -> None:
    model = tiny_llama()
    assert quantize(model, LowBit()) == []
    assert describe_quantization(model) == {}
    assert quantized(model) == set()


def test_a_tied_embedding_stays_tied_and_plain() -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = make()
        quantize(model, LowBit("nf4"))
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is table.weight
        assert type(head) is nn.Linear
        assert head.weight.dtype == torch.float32


def test_an_untied_output_layer_and_a_head_stay_plain() -> None:
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    quantize(model, LowBit("nf4"))
    assert type(model.lm_head) is nn.Linear
    adapter = AdapterConfig(name="lora", rank=4, train=("layer.1.output.dense",))
    bert = add_adapter(tiny_bert(), adapter, seed=5, low_bit=LowBit("int8"))
    assert not {name for name in quantized(bert) if "classifier" in name or "layer.1.output.dense" in name}
    assert {name for name in quantized(bert) if "layer.0.output.dense" in name}


def test_weights_that_two_layers_share_stay_plain() -> None:
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    assert not {name for name in quantize(model, LowBit("nf4")) if "up_proj" in name}


def test_no_layer_to_quantize() -> None:
    with pytest.raises(ConfigError, match="--quantization nf4: this model has no linear layer to quantize"):
        quantize(tiny_bert(), LowBit("nf4"), keep=("bert", "classifier"))


def test_layers_across_become_ordinary_ones() -> None:
    """GPT-2's are of a class of their own, whose weights lie across."""
    model = tiny_gpt2()
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    model = add_adapter(model, AdapterConfig(name="lora", rank=4), seed=5, low_bit=LowBit("nf4"))
    assert len(quantized(model)) == 8
    factors = dict(model.named_parameters())
    assert factors["transformer.h.0.attn.c_attn.lora_A.default.weight"].shape == (4, 32)
    assert factors["transformer.h.0.attn.c_attn.lora_B.default.weight"].shape == (96, 4)


@pytest.mark.parametrize("name", ["none", "pissa"])
def test_adapters_that_have_no_place(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--quantization nf4 with --adapter.name {name}: "):
        add_adapter(tiny_bert(), AdapterConfig(name=name), seed=5, low_bit=LowBit("nf4"))  # type: ignore[arg-type]


def test_the_fingerprint_is_that_of_the_plain_weights() -> None:
    config = AdapterConfig(name="lora", rank=4)
    low = adapter_of(add_adapter(tiny_bert(), config, seed=5, low_bit=LowBit("nf4")))
    plain = adapter_of(add_adapter(tiny_bert(), config, seed=5))
    assert low
    assert plain
    assert low.fingerprint == plain.fingerprint == fingerprint(tiny_bert(), plain.whole)
    assert (low.quantization, plain.quantization) == ("nf4", "none")


@pytest.mark.parametrize("name", LOW)
def test_an_evaluation_leaves_a_layer_as_it_was(name: str) -> None:
    """bitsandbytes' own packs its weights anew there, or computes with rounded inputs."""
    model = tiny_llama()
    quantize(model, LowBit(name))
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 32)
    before, bits = gradient_of(layer.train(), x), layer.weight.detach().clone()
    trained = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)
    assert torch.equal(layer.weight, bits)
    assert torch.equal(gradient_of(layer.train(), x), before)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_bias_keeps_its_type_and_bits(name: str) -> None:
    model = tiny_bert()
    nn.init.normal_(model.bert.encoder.layer[0].output.dense.bias)
    quantize(model, LowBit(name))
    layer = model.bert.encoder.layer[0].output.dense
    before = layer.bias.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 64)).dtype == torch.bfloat16
    assert layer(torch.randn(3, 64)).dtype == torch.float32
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int8", "nf4-double"])
def test_the_probe_takes_packed_weights(name: str, storage: torch.dtype, precision: str) -> None:
    low_bit = LowBit(name, storage)
    model = add_adapter(tiny_bert(), AdapterConfig(name="lora", rank=4), seed=5, low_bit=low_bit)
    task = Recording()
    task.seen.append([])
    probe_gradients(model, task, task.collate(tiny_data()[:4], empty=False), Precision(precision))


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_the_checksum_is_a_number_and_tells_weights_apart(name: str, storage: torch.dtype) -> None:
    """Seen as fp32 or bf16, packed bytes may be no number: 0xff 0xff is NaN."""
    model, other = tiny_llama(), tiny_llama()
    if storage != torch.uint8:
        weight = model.model.layers[0].mlp.up_proj.weight.detach()
        weight[:] = weight.abs().max()  # all bits of NF4's and FP4's largest value, or near it
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0] *= -1
    for m in (model, other):
        quantize(m, LowBit(name, storage=storage))
    sums = [[checksum(p) for p in m.parameters()] for m in (model, other)]
    assert all(math.isfinite(value) for values in sums for value in values)
    assert sums[0] != sums[1]
    assert sums[1] == [checksum(p) for p in other.parameters()]


@pytest.mark.parametrize("name", LOW)
def test_padding_and_logits_can_still_be_left_out(name: str) -> None:
    """The looks at that compare outputs of the network as it is laid out for bf16, too: they must not be rounded."""
    model = add_adapter(tiny_llama(), AdapterConfig(name="lora", rank=4), seed=5, low_bit=LowBit(name, torch.bfloat16))
    assert [fuse_loss(model), remove_padding(model)] == ["", ""]


def test_the_plan_tells_what_the_base_takes() -> None:
    model = add_adapter(tiny_llama(), AdapterConfig(name="lora", rank=4), seed=5, low_bit=LowBit("nf4"))
    said = describe_quantization(model)
    assert said["quantization"] == (
        "nf4 in 14 layers (2 × q_proj, 2 × k_proj, 2 × v_proj, 2 × o_proj, 2 × gate_proj, 2 × up_proj, 2 × down_proj)"
    )
    assert said["base"].endswith("plain (embed_tokens, input_layernorm, post_attention_layernorm, norm)")
    layer = model.model.layers[0].mlp.up_proj
    assert weight_bytes(layer.weight) == 64 * 32 // 2 + 4 * 64 * 32 // 64, "half a byte, and fp32 for each block of 64"
    quantize(model := tiny_llama(), LowBit("int8"))
    assert weight_bytes(model.model.layers[0].mlp.up_proj.weight) == 64 * 32 + 4 * 64
