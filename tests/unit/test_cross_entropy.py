"""A loss without logits: the value and the gradients of the plain one, in a fraction of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from toolkit.compute import cross_entropy as module
from toolkit.compute import fuse_loss, linear_cross_entropy, remove_padding
from toolkit.compute.cross_entropy import IGNORED
from toolkit.precision import Reduced

TOKENS, WIDTH, VOCABULARY = 37, 16, 101
TYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def inputs(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = IGNORED
    more = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), labels, more


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=IGNORED, reduction="sum")


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one.float() - other.float()).norm() / other.float().norm()).detach())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 7, 1000], ids=["rows", "chunks", "whole"])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_value_and_gradients(dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", rows * VOCABULARY)
    expected, found = inputs(dtype, bias), inputs(dtype, bias)
    (3 * plain(*expected)).backward()
    loss = linear_cross_entropy(*found)
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    assert apart(loss, plain(*expected)) < (1e-6 if dtype == torch.float32 else 1e-5)
    for one, other in zip(found, expected, strict=True):
        if one is not None and one.requires_grad:
            assert one.grad.dtype == dtype
            assert apart(one.grad, other.grad) < TYPES[dtype]


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: int) -> None:
    expected, found = inputs(), inputs()
    found[frozen].requires_grad_(False)
    plain(*expected).backward()
    linear_cross_entropy(*found).backward()
    assert found[frozen].grad is None
    assert apart(found[1 - frozen].grad, expected[1 - frozen].grad) < 1e-6


def test_where_nothing_counts_the_gradients_are_zero() -> None:
    hidden, weight, labels, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, labels.fill_(IGNORED))
    loss.backward()
    assert float(loss) == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients_there_is_no_product_for_them() -> None:
    hidden, weight, labels, _ = inputs()
    with Largest() as largest, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert largest.products == 1


class Largest(TorchDispatchMode):
    """Watches what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.products += "mm" in str(func)
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(found) if torch.is_tensor(leaf))])
        return found


# Models

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
MLP = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
FUSED = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**MLP)),
    "Llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**MLP, tie_word_embeddings=True)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**MLP)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**MLP, tie_word_embeddings=True)),
    "Gemma": lambda: GemmaForCausalLM(GemmaConfig(**MLP, head_dim=8)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
}
LEFT = {
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**MLP, head_dim=8, final_logit_softcapping=1.0)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**MLP, logits_scaling=2.0)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**MLP)),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return (FUSED | LEFT)[name]().train()


def batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([9, 14, 4])
    there = torch.arange(14) < lengths[:, None]
    ids = torch.arange(42).view(3, 14) * 7919 % 1000
    labels = ids.roll(-1, 1).masked_fill(torch.arange(14) >= lengths[:, None] - 1, IGNORED)
    return {"input_ids": ids.where(there, 0), "attention_mask": there.long(), "labels": labels}


def losses(model: Any, **texts: torch.Tensor) -> torch.Tensor:
    labels = texts.pop("labels")
    return plain_of(model(**texts).logits, labels)


def plain_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("free", ["padded", "free, then fused", "fused, then free"])
@pytest.mark.parametrize("name", FUSED)
def test_models_give_their_loss(name: str, free: str) -> None:
    expected, model = model_of(name), model_of(name)
    verbs = {"padded": [fuse_loss], "free, then fused": [remove_padding, fuse_loss]}
    assert [verb(model) for verb in verbs.get(free, [fuse_loss, remove_padding])] in ([""], ["", ""])
    loss = model(**batch()).logits
    assert loss.shape == (1,)
    loss.sum().backward()
    whole = losses(expected, **batch())
    whole.backward()
    torch.testing.assert_close(loss[0], whole, rtol=1e-5, atol=0)
    for (parameter, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert apart(one.grad, other.grad) < 1e-5, parameter


@pytest.mark.parametrize("name", LEFT)
def test_models_that_do_something_to_logits_stay_as_they_were(name: str) -> None:
    model = model_of(name)
    ids = batch()["input_ids"]
    before = model(input_ids=ids).logits
    assert fuse_loss(model).startswith("its loss would differ")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model._forward_pre_hooks
    assert "forward" not in vars(model.get_output_embeddings())


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8000)
    model = model_of("Llama")
    with Largest() as whole:
        losses(model, **batch()).backward()
    fuse_loss(model)
    with Largest() as largest:
        model(**batch()).logits.sum().backward()
    assert whole.elements >= 42 * 1000
    assert largest.elements <= 1000 * 32, "the weight's gradient is the largest"


def test_without_labels_it_computes_as_before() -> None:
    model = model_of("Llama").eval()
    ids = batch()["input_ids"][:1]
    before, text = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    fuse_loss(model)
    model(**batch())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)
    with pytest.raises(IndexError):
        model(**batch() | {"input_ids": ids + 1000})
    assert torch.equal(model(input_ids=ids).logits, before), "labels of a forward that failed are forgotten"


def test_in_bf16_and_with_activations_computed_again() -> None:
    expected, model = model_of("Llama, tied"), model_of("Llama, tied")
    fuse_loss(model)
    model.gradient_checkpointing_enable()
    reduced = Reduced(model, torch.bfloat16)
    texts = batch()
    loss = reduced.forward(texts).logits
    reduced.backward(loss.sum())
    whole = losses(expected, **texts)
    whole.backward()
    assert apart(loss, whole[None]) < 2**-8
    for (parameter, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.dtype == torch.float32
        assert apart(one.grad, other.grad) < 0.03, parameter
