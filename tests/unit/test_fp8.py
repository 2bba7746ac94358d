"""Products in fp8, emulated: which layers, how numbers are rounded, and that a text does not depend on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.job import tiny_bert, tiny_llama
from toolkit.compute import check_fp8, checkpoint_activations, fuse_loss, multiply_in_fp8, remove_padding
from toolkit.compute.padding_free import short_texts
from toolkit.errors import ConfigError
from toolkit.precision import Precision, Reduced

pytest.importorskip("torchao", reason="needs torchao, with which every start takes longer")
CPU = torch.device("cpu")


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def test_which_layers() -> None:
    model = tiny_llama()
    fuse_loss(model)
    names = {name for name, _ in model.named_parameters()}
    assert multiply_in_fp8(model, CPU) == 2 * 7
    assert {name.rpartition(".")[2] for name in layers(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert {name for name, _ in model.named_parameters()} == names
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_sides_and_what_is_frozen() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    for block in model.model.layers:
        block.self_attn.q_proj.weight.requires_grad_(False)
    assert multiply_in_fp8(model, CPU) == 2 * 3  # 40 is no multiple of 16
    assert all("mlp" not in name and "q_proj" not in name for name in layers(model))


def test_nothing_to_multiply() -> None:
    model = tiny_bert().requires_grad_(False)
    with pytest.raises(ConfigError, match="no effect on this model"):
        multiply_in_fp8(model, CPU)


def test_tokens_are_rounded_with_a_scale_of_their_own() -> None:
    """e4m3 has 3 bits behind the point: within 2⁻⁴ of each number, whatever the size of the tokens beside it."""
    model = tiny_bert()
    multiply_in_fp8(model, CPU)
    layer: Any = next(iter(layers(model).values()))
    torch.manual_seed(0)
    tokens = torch.randn(4, 32) * torch.tensor([1e-3, 1.0, 1e3, 1e-6])[:, None]
    with torch.no_grad():
        layer.bias.zero_()
        found, exact = layer(tokens), tokens @ layer.weight.T
    apart = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert bool((apart < 2**-4).all())
    assert bool((apart > 2**-9).all())  # bf16 would be nearer
    assert all(torch.equal(layer(tokens[i : i + 1])[0], found[i]) for i in range(4))


def test_the_gradient_of_a_weight_is_a_product_of_what_came_in() -> None:
    model = tiny_bert()
    multiply_in_fp8(model, CPU)
    layer: Any = next(iter(layers(model).values()))
    torch.manual_seed(0)
    tokens, back = torch.randn(24, 32, requires_grad=True), torch.randn(24, 32)
    layer(tokens).backward(back)
    torch.testing.assert_close(layer.weight.grad, back.T @ tokens.detach(), rtol=1e-5, atol=1e-5)
    assert tokens.grad is not None
    exact = back @ layer.weight.detach()
    assert 2**-9 < float((tokens.grad - exact).norm() / exact.norm()) < 2**-4


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    reduced = Reduced(model, torch.bfloat16)
    with torch.no_grad():
        found: torch.Tensor = reduced.forward({"input_ids": ids, "attention_mask": mask})[0]
    return found


@pytest.mark.parametrize("free", [True, False], ids=["no padding", "padded"])
def test_a_text_does_not_depend_on_others(free: bool) -> None:
    model = tiny_bert().eval()
    inputs = short_texts(model.config)
    if free:
        assert remove_padding(model) == ""
    multiply_in_fp8(model, CPU)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    other = ids.clone()
    other[0] = (ids[0] * 7) % 97 + 1
    before, after = logits(model, ids, mask), logits(model, other, mask)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    reduced = Reduced(model, torch.bfloat16)
    reduced.backward(reduced.forward(inputs)[0].float().square().sum())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_computed_again_it_is_the_same(kind: Any) -> None:
    found = []
    for each in ("none", kind):
        model = tiny_bert().train()
        inputs = short_texts(model.config)
        assert remove_padding(model) == ""
        multiply_in_fp8(model, CPU)
        if each != "none":
            checkpoint_activations(model, each)
        found.append(gradients(model, inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("strategy", "adapter", "words"),
    [("ddp", "lora", "no effect with --adapter.name lora"), ("zero3", "none", "with zero3 is refused")],
)
def test_refused(strategy: str, adapter: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_fp8(strategy, adapter)


def test_it_is_bf16_but_for_products() -> None:
    precision = Precision("fp8")
    assert precision.dtype == torch.bfloat16
    assert precision.reduced
    check_fp8("fsdp", "none")
