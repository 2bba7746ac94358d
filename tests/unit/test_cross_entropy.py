"""The loss without logits: its numbers are those of the logits, for functions, for models, and over ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from tests.ranks import on_ranks
from toolkit.compute import cross_entropy as module
from toolkit.compute import fuse_loss, linear_cross_entropy, remove_padding
from toolkit.compute.cross_entropy import EVEN, _chunks, text_losses
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.errors import ModelError
from toolkit.optim import adamw
from toolkit.precision import Precision, Reduced
from toolkit.strategies import choose_strategy
from toolkit.world import world

TOKENS, WIDTH, VOCABULARY = 60, 32, 500
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OF_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | {"tie_word_embeddings": False}),
    "llama, tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", OF_GPT2 | DROPOUT),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "mistral": ("Mistral", SIZES),
    "gemma": ("Gemma", SIZES),
}
LENGTHS = torch.tensor([5, 20, 11, 16])
MASK = (torch.arange(20) < LENGTHS[:, None]).long()
IDS = torch.randint(3, VOCABULARY, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK
LABELS = IDS.roll(-1, 1).masked_fill((MASK.roll(-1, 1) == 0) | (torch.arange(20) < 3) | (torch.arange(20) == 19), -100)
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: Any = None) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight and a bias."""
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(shape, generator=generator) for shape in ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)))
    hidden, weight, bias = ((tensor * size).to(dtype) for tensor, size in zip(drawn, (1, 0.3, 1), strict=True))
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def labels() -> torch.Tensor:
    """A third does not count."""
    drawn = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    return drawn.masked_fill(torch.arange(TOKENS) % 3 == 0, -100)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_alike(
    function: Callable[..., torch.Tensor], dtype: torch.dtype, bound: float, factor: float = 0.7, biased: bool = True
) -> None:
    """Value and gradients are those of plain cross-entropy in fp64; what comes from above is multiplied in."""
    inputs = tensors(dtype) if biased else tensors(dtype)[:2]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = exact[0] @ exact[1].T + (exact[2] if biased else 0)
    expected = cross_entropy(logits, labels(), reduction="sum", ignore_index=-100)
    loss = function(inputs[0], inputs[1], labels(), *inputs[2:])
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=bound)
    gradients = torch.autograd.grad(loss * factor, inputs)
    for found, right, given in zip(gradients, torch.autograd.grad(expected * factor, exact), inputs, strict=True):
        assert found.dtype == given.dtype
        assert difference(found, right) < bound


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [None, 1, 7], ids=["one chunk", "token by token", "chunks of 7"])
def test_value_and_gradients(tokens: int | None, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tokens:
        monkeypatch.setattr(module, "CHUNK", tokens * VOCABULARY + 1)
    assert_alike(linear_cross_entropy, torch.float32, 1e-5, biased=biased)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [60, 7], ids=["one chunk", "chunks of 7"])
def test_reduced(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", tokens * VOCABULARY)
    monkeypatch.setattr(module, "PART", 33 * WIDTH)
    assert_alike(linear_cross_entropy, dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("tokens", [60, 7], ids=["one chunk", "chunks of 7"])
def test_the_losses_of_texts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is that of its tokens, also of a text without any, in a sum that weighs them and is not linear."""
    monkeypatch.setattr(module, "CHUNK", tokens * VOCABULARY)
    inputs = tensors()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    given = labels().view(4, -1).index_fill(0, torch.tensor([2]), -100)
    each = cross_entropy(exact[0] @ exact[1].T + exact[2], given.flatten(), ignore_index=-100, reduction="none").view(
        4, -1
    )
    expected = each.sum(1)
    found = text_losses(inputs[0].view(4, -1, WIDTH), inputs[1], given, inputs[2])
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert found[2] == 0
    weights = torch.tensor([0.3, -2.0, 5.0, 1.0])
    gradients = torch.autograd.grad((weights * found.sigmoid().log() + found**2).sum(), inputs)
    for one, right in zip(
        gradients, torch.autograd.grad((weights * expected.sigmoid().log() + expected**2).sum(), exact), strict=True
    ):
        assert difference(one, right) < 1e-5


def test_fp16_keeps_the_gradients_of_unlikely_words() -> None:
    """Each of 2**20 words has a share of 1e-7, less than two of the steps in which fp16 counts there."""
    weight = torch.zeros(2**20, 4, dtype=torch.float16)
    weight[7] = 4
    hidden = torch.ones(1, 4, dtype=torch.float16)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), torch.tensor([3]))
    (gradient,) = torch.autograd.grad(loss * 2**15, weight)
    assert gradient[5].tolist() == pytest.approx([2**15 / (2**20 - 1 + math.exp(16))] * 4, rel=2**-10)


def test_large_logits() -> None:
    hidden, weight, _ = tensors()
    loss = linear_cross_entropy(hidden * 1e4, weight, labels())
    assert float(loss.detach()) == pytest.approx(float(plain(hidden * 1e4, weight, labels()).detach()), rel=1e-5)


def test_a_graph_that_is_retained_gives_its_gradients_again() -> None:
    hidden, weight, _ = tensors()
    loss = linear_cross_entropy(hidden, weight, labels())
    first = torch.autograd.grad(loss * 3, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss * 3, [hidden, weight])
    assert all(map(torch.equal, first, second))


def test_the_weight_may_be_away_in_backward() -> None:
    """As DeepSpeed takes it away between forward and backward, and another may be there then."""
    hidden, weight, _ = tensors()
    expected = torch.autograd.grad(plain(hidden, weight, labels()), [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, labels())
    weight.data = torch.full_like(weight, torch.nan)
    for found, right in zip(torch.autograd.grad(loss, [hidden, weight]), expected, strict=True):
        assert difference(found, right) < 1e-5


def test_where_no_label_counts_the_loss_is_zero_and_has_gradients() -> None:
    inputs = tensors()
    loss = linear_cross_entropy(inputs[0], inputs[1], torch.full((TOKENS,), -100), inputs[2])
    assert float(loss.detach()) == 0
    for found, given in zip(torch.autograd.grad(loss, inputs), inputs, strict=True):
        assert torch.equal(found, torch.zeros_like(given))


class Products(TorchDispatchMode):
    """Notes the multiplications of all matrix products, and the elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1].rstrip("_")
        if name in ("mm", "addmm"):
            factors = args[-2:]
            self.products.append(factors[0].shape[0] * factors[0].shape[1] * factors[1].shape[1])
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return output


def multiplications(needed: tuple[bool, bool], grad: bool = True, counted: torch.Tensor | None = None) -> float:
    """In units of those of the logits of all tokens."""
    hidden, weight = (tensor.requires_grad_(need) for tensor, need in zip(tensors()[:2], needed, strict=True))
    with torch.set_grad_enabled(grad), Products() as seen:
        loss = linear_cross_entropy(hidden, weight, torch.arange(TOKENS) if counted is None else counted)
        if loss.requires_grad:
            loss.backward()
    for tensor, need in ((hidden, needed[0]), (weight, needed[1])):
        assert (tensor.grad is not None) == (need and grad)
    return sum(seen.products) / (TOKENS * WIDTH * VOCABULARY)


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVEN", 1)  # nothing fills the chunk up
    assert multiplications((True, True)) == 3
    assert multiplications((True, False)) == 2, "a frozen weight"
    assert multiplications((False, True)) == 2
    assert multiplications((False, False)) == 1
    assert multiplications((True, True), grad=False) == 1
    assert multiplications((True, True), counted=labels()) == 2, "two thirds count"


def test_chunks_have_few_sizes() -> None:
    """A CPU keeps what it prepares for each size."""
    weight = torch.empty(2**13, 1)
    found = {count: _chunks(count, weight) for count in range(1, 8200)}
    assert all(count <= size * number <= count + 64 * number for count, (size, number) in found.items())
    assert all(size <= 2048 for size, _ in found.values())
    assert {found[count][0] for count in range(7700, 8190)} == {1984, 2048}
    assert _chunks(0, weight) == (2048, 0)


def test_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10 * VOCABULARY)
    model = language_model("llama")
    assert fuse_loss(model) == ""
    every = torch.ones(8, 20, dtype=torch.long)
    logits = every.numel() * VOCABULARY
    with Products() as seen:
        model(input_ids=every, labels=every).logits.sum().backward()
    assert seen.largest == VOCABULARY * WIDTH < logits / 4, "the weight and its gradient"
    with Products() as seen:
        cross_entropy(model(input_ids=every).logits.flatten(0, 1), every.flatten()).backward()
    assert seen.largest == logits


# Models


def language_model(name: str, **options: Any) -> Any:
    family, sizes = MODELS.get(name, (name, SIZES))
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(sizes | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # so that the loss is not that of chance
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def of_logits(outputs: Any) -> torch.Tensor:
    return cross_entropy(outputs.logits.float().flatten(0, 1), LABELS.flatten(), reduction="sum", ignore_index=-100)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_loss(expected: Any, fused: Any, bound: float = 1e-5) -> None:
    """Of the model as it is and the fused one: the loss and each gradient."""
    loss = of_logits(expected(**INPUTS))
    loss.backward()
    outputs = fused(**INPUTS, labels=LABELS)
    assert outputs.logits.shape == (1,)
    assert outputs.logits.dtype == torch.float32
    assert outputs.loss is None
    outputs.logits.sum().backward()
    assert float(outputs.logits.detach()) == pytest.approx(float(loss.detach()), rel=bound)
    right, found = gradients(expected), gradients(fused)
    assert found.keys() == right.keys() != set()
    largest = max(float(gradient.norm()) for gradient in right.values())
    for name, gradient in right.items():
        assert float((found[name] - gradient).norm()) < bound * max(float(gradient.norm()), largest / 100), name


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    expected, fused = language_model(name), language_model(name)
    assert fuse_loss(fused) == ""
    assert fused.training
    assert_same_loss(expected, fused)
    with torch.no_grad():
        loss = float(fused(**INPUTS, labels=LABELS, return_dict=False)[0])
    assert loss == pytest.approx(float(of_logits(expected(**INPUTS)).detach()), rel=1e-5)


def test_a_masked_language_model() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fused = AutoModelForMaskedLM.from_config(BertConfig(**sizes))
    expected = copy.deepcopy(fused)
    assert fuse_loss(fused) == ""
    assert_same_loss(expected, fused)


@pytest.mark.parametrize(
    ("family", "options"),
    [("Gemma2", {}), ("Granite", {"logits_scaling": 8.0}), ("Cohere", {"logit_scale": 0.06})],
    ids=["soft-capped", "divided", "multiplied"],
)
def test_models_that_change_logits_are_left_as_they_are(family: str, options: dict[str, Any]) -> None:
    expected, model = language_model(family, **options), language_model(family, **options)
    assert "it changes logits" in fuse_loss(model)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert vars(model.get_output_embeddings()).keys() == vars(expected.get_output_embeddings()).keys()
    results = [each(**INPUTS, labels=IDS) for each in (model, expected)]
    assert torch.equal(results[0].logits, results[1].logits)
    assert torch.equal(results[0].loss, results[1].loss)


def test_a_model_whose_loss_is_not_finite_is_left_as_it_is() -> None:
    model = language_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    assert "differ by nan" in fuse_loss(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_models_without_a_head_for_words() -> None:
    classifier = transformers.BertForSequenceClassification(BertConfig(**SIZES))
    assert fuse_loss(classifier) == "it has no output embedding"
    assert fuse_loss(torch.nn.Linear(2, 2)) == "it has no output embedding"
    model = language_model("llama")
    model.lm_head = torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    assert fuse_loss(model) == "its output embedding is a ParametrizedLinear"


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_with_reduced_copies(name: str) -> None:
    expected, fused = language_model(name), language_model(name)
    assert fuse_loss(fused) == ""
    found = []
    for model, given in ((expected, {}), (fused, {"labels": LABELS})):
        reduced = Reduced(model, torch.bfloat16)
        outputs = reduced.forward(INPUTS | given)
        loss = outputs.logits.sum() if given else of_logits(outputs)
        reduced.backward(loss)
        assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        found.append((float(loss.detach()), gradients(model)))
    (right, exact), (loss, rounded) = found
    assert loss == pytest.approx(right, rel=2**-9)
    assert rounded.keys() == exact.keys()
    for part in ("lm_head.weight" if name == "llama" else "model.embed_tokens.weight", "model.norm.weight"):
        assert difference(rounded[part], exact[part]) < 2**-6, part


@pytest.mark.parametrize("first", ["padding", "loss"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_padding(name: str, first: str) -> None:
    expected, fused = language_model(name), language_model(name)
    steps = [remove_padding, fuse_loss]
    for step in steps if first == "padding" else reversed(steps):
        assert step(fused) == ""
    assert_same_loss(expected, fused)
    seen: list[int] = []
    block = (fused.transformer.h if name == "gpt2" else fused.model.layers)[-1].mlp
    block.register_forward_hook(lambda layer, args, output: seen.append(output.shape[0]))
    fused(**INPUTS, labels=LABELS)
    assert seen == [1]


def test_gradient_checkpointing() -> None:
    expected, fused = language_model("llama"), language_model("llama")
    assert fuse_loss(fused) == ""
    fused.gradient_checkpointing_enable()
    assert_same_loss(expected, fused)


def test_adapters() -> None:
    models = []
    for number in range(3):  # as it is; fused first; adapted first
        model = language_model("llama, tied")
        assert number != 1 or fuse_loss(model) == ""
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        assert number != 2 or fuse_loss(model) == ""
        models.append(model)
    expected, *others = models
    for fused in others:
        assert_same_loss(expected, fused)
        with Products() as seen:
            fused(**INPUTS, labels=LABELS)
        head = -(-int((LABELS != -100).sum()) // EVEN) * EVEN * WIDTH * VOCABULARY
        assert seen.products.count(head) == 2, "no gradient of the frozen head"


def test_an_adapter_on_the_head() -> None:
    adapter = peft.LoraConfig(target_modules=["lm_head"])
    assert "its output embedding is a" in fuse_loss(peft.get_peft_model(language_model("llama"), adapter))
    model = language_model("llama")
    assert fuse_loss(model) == ""
    with pytest.raises(ModelError, match="another output embedding"):
        peft.get_peft_model(model, adapter)(**INPUTS, labels=LABELS)


def test_without_labels_it_computes_as_before() -> None:
    expected, fused = language_model("llama").eval(), language_model("llama").eval()
    assert fuse_loss(fused) == ""
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    prompt = {name: value.flip(1) for name, value in INPUTS.items()}
    for _ in range(2):
        assert torch.equal(fused.generate(**prompt, **options), expected.generate(**prompt, **options))
        assert torch.equal(fused(**INPUTS).logits, expected(**INPUTS).logits)
        assert fused(**INPUTS, labels=LABELS).past_key_values is None


def test_labels_are_forgotten_after_a_forward_also_one_that_fails() -> None:
    model = language_model("llama")
    assert fuse_loss(model) == ""
    hidden = torch.zeros(*IDS.shape, WIDTH)
    model(**INPUTS, labels=LABELS)
    assert model.lm_head(hidden).shape == (*IDS.shape, VOCABULARY)
    with pytest.raises(IndexError):
        model(input_ids=IDS + VOCABULARY, labels=LABELS)
    assert model.lm_head(hidden).shape == (*IDS.shape, VOCABULARY)
    with pytest.raises(ModelError, match="not of the same tokens"):
        model(**INPUTS, labels=LABELS[:, 1:])
    assert model(**INPUTS).logits.shape == (*IDS.shape, VOCABULARY)


def test_a_copy_has_labels_of_its_own() -> None:
    model = language_model("llama, tied")
    assert fuse_loss(model) == ""
    twin = copy.deepcopy(model)
    model.zero_grad()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert_same_loss(language_model("llama, tied"), twin)


# Ranks

OPTIM = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0)
STEPS = 3
Outcome = tuple[list[float], dict[str, np.ndarray[Any, Any]]]


def train(strategy_name: str, model_name: str, fused: bool) -> Outcome:
    """Steps on four texts, dealt to the ranks; in the second step the last half of them has no label that counts."""
    w = world()
    w.connect()
    strategy = choose_strategy(
        StrategyConfig(name=strategy_name),
        world=w,
        precision=Precision("fp32"),
        shape=batch_shape(len(IDS), None, w.size),
        max_grad_norm=1.0,
    )
    model = language_model(model_name)
    assert not fused or fuse_loss(model) == ""
    strategy.setup(model, lambda wrapped: adamw(wrapped, OPTIM))
    losses = []
    for step in range(STEPS):
        targets = LABELS.clone()
        if step == 1:
            targets[2:] = -100
        share = slice(w.rank * len(IDS) // w.size, (w.rank + 1) * len(IDS) // w.size)
        inputs = {name: value[share] for name, value in INPUTS.items()}
        with strategy.micro_batch(last=True):
            if fused:
                loss = strategy.forward(inputs | {"labels": targets[share]}).logits.sum()
            else:
                logits = strategy.forward(inputs).logits.flatten(0, 1)
                loss = cross_entropy(logits, targets[share].flatten(), reduction="sum", ignore_index=-100)
            strategy.backward(loss / (targets != -100).sum())
        losses.append(float(w.sum(loss.detach())))
        assert strategy.update(OPTIM.lr).applied
    weights = {name: tensor.numpy() for name, tensor in strategy.weights().items()}
    strategy.teardown()
    w.close()
    return losses, weights


@pytest.mark.parametrize("model", ["llama", "llama, tied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_ranks(strategy: str, model: str) -> None:
    ((expected, right),) = on_ranks(train, 1, "single", model, False)
    (losses, weights), (others, _) = on_ranks(train, 2, strategy, model, True)
    assert losses == others == pytest.approx(expected, rel=1e-5)
    assert set(right) <= set(weights) | {"lm_head.weight"}
    for name, found in weights.items():
        assert np.linalg.norm(found - right[name]) < 1e-5 * np.linalg.norm(right[name]), name


def test_under_autocast_the_types_are_those_of_the_weight() -> None:
    hidden, weight, bias = tensors()
    expected = linear_cross_entropy(hidden, weight, labels(), bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels(), bias)
    assert torch.equal(found, expected)
    found.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
