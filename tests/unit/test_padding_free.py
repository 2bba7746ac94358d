"""Models without padding: the numbers of the padded ones, for networks of many families as transformers has them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.bert.modeling_bert import BertLayer

from toolkit.compute import attention
from toolkit.compute.padding_free import IMPLEMENTATION, attend, remove_padding
from toolkit.compute.texts import ROW, Pairs, Texts

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
    "max_position_embeddings": 200,
    "pad_token_id": 0,
    "num_labels": 3,
}
OF_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "pad_token_id": 0, "num_labels": 3}
OF_DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 500, "num_labels": 3}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "Electra": SIZES | {"embedding_size": 32},
    "DistilBert": OF_DISTILBERT,
    "ModernBert": SIZES | {"local_attention": 24},
    "GPT2": OF_GPT2,
    "GPTNeoX": SIZES,
    "OPT": SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Llama": SIZES | GROUPED,
    "Mistral": SIZES | GROUPED | {"sliding_window": 16},
    "Qwen3": SIZES | GROUPED,
    "Phi3": SIZES | {"num_key_value_heads": 2},
    "Gemma3Text": SIZES | GROUPED | {"sliding_window": 16},
}
OF_T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
OF_BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 100,
}
TOKENS = {"vocab_size": 500, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
PAIRED = {"T5": OF_T5, "MT5": OF_T5, "UMT5": OF_T5, "Bart": OF_BART, "Marian": OF_BART, "Pegasus": OF_BART}
OF_IMAGES = SIZES | {"image_size": 48, "patch_size": 8, "num_channels": 3, "drop_path_rate": 0.0}
LENGTHS = torch.tensor([5, 40, 17, 17, 63, 9, 22, 30, 12, 8, 51])
MASK = (torch.arange(63) < LENGTHS[:, None]).long()
IDS = torch.randint(3, 500, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK
ANSWER_LENGTHS = torch.tensor([9, 3, 28, 1, 17, 20, 5, 6, 14, 28, 2])
ANSWER_MASK = (torch.arange(28) < ANSWER_LENGTHS[:, None]).long()
ANSWERS = torch.randint(3, 500, ANSWER_MASK.shape, generator=torch.Generator().manual_seed(1)) * ANSWER_MASK


def pair(family: str, dropout: float = 0.0) -> tuple[Any, Any]:
    """Two equal classifiers."""
    return twins(
        AutoModelForSequenceClassification, getattr(transformers, f"{family}Config")(**FAMILIES[family]), dropout
    )


def paired(family: str, dropout: float = 0.0) -> tuple[Any, Any]:
    """Two equal models with an encoder and a decoder."""
    return twins(AutoModelForSeq2SeqLM, getattr(transformers, f"{family}Config")(**PAIRED[family], **TOKENS), dropout)


def twins(kind: Any, config: PreTrainedConfig, dropout: float = 0.0) -> tuple[Any, Any]:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    first = kind.from_config(config, dtype=torch.float32)
    second = kind.from_config(copy.deepcopy(config), dtype=torch.float32)
    second.load_state_dict(first.state_dict())
    return first.train(), second.train()


def loss_and_gradient(model: Any, mask: torch.Tensor = MASK) -> tuple[float, torch.Tensor]:
    logits = model(input_ids=IDS, attention_mask=mask).logits
    return backward(model, cross_entropy(logits, torch.arange(len(IDS)) % 3))


def of_answers(model: Any) -> tuple[float, torch.Tensor]:
    logits = answers(model)
    return backward(model, cross_entropy(logits[ANSWER_MASK.bool()], ANSWERS[ANSWER_MASK.bool()]))


def answers(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": MASK}
    decoded = {"decoder_input_ids": ANSWERS, "decoder_attention_mask": ANSWER_MASK}
    logits: torch.Tensor = model(**inputs, **decoded).logits
    return logits


def backward(model: Any, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_alike(padded: tuple[float, torch.Tensor], free: tuple[float, torch.Tensor]) -> None:
    (loss, gradient), (loss_here, gradient_here) = padded, free
    assert loss_here == pytest.approx(loss, rel=1e-5)
    assert float((gradient_here - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_padded_model(family: str) -> None:
    padded, free = pair(family)
    assert remove_padding(free) == ""
    assert_alike(loss_and_gradient(padded), loss_and_gradient(free))


@pytest.mark.parametrize("family", PAIRED)
@pytest.mark.parametrize("plain", [512, 16], ids=["short", "long"])
def test_an_encoder_and_its_decoder(family: str, plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PLAIN", plain)
    padded, free = paired(family)
    assert remove_padding(free) == ""
    assert_alike(of_answers(padded), of_answers(free))


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_an_encoder_and_its_decoder_as_a_classifier(family: str) -> None:
    """Of which one has to know where a text ends."""
    config = getattr(transformers, f"{family}Config")(**PAIRED[family], **TOKENS, num_labels=3)
    padded, free = twins(AutoModelForSequenceClassification, config)
    assert remove_padding(free) == ""
    ended = IDS.clone()
    ended[torch.arange(len(IDS)), LENGTHS - 1] = 1
    inputs = {"input_ids": ended, "attention_mask": MASK, "decoder_attention_mask": MASK}
    torch.testing.assert_close(free(**inputs).logits, padded(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_pair_sees_no_other(family: str) -> None:
    _, model = paired(family)
    assert remove_padding(model) == ""
    before = answers(model)
    others = IDS.clone()
    others[4] = (others[4] * 7) % 497 + 3
    changed = ((before != answers(model, others)).any(2) & ANSWER_MASK.bool()).any(1)
    assert changed.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("family", ["T5", "UMT5", "Bart"])
def test_an_encoder_and_a_decoder_compute_no_padding(family: str) -> None:
    _, model = paired(family)
    assert remove_padding(model) == ""
    seen: dict[torch.nn.Module, torch.Size] = {}
    biases: list[torch.Size] = []
    stacks = [model.get_encoder(), model.get_decoder()]
    for stack in stacks:
        for name, layer in stack.named_modules():
            if isinstance(layer, nn.Linear) and layer.in_features == 128:
                layer.register_forward_hook(lambda layer, args, output, stack=stack: seen.update({stack: output.shape}))
            if name.endswith("relative_attention_bias"):
                layer.register_forward_hook(lambda layer, args, output: biases.append(output.shape[:2]))
    answers(model)
    rows = [math.ceil(int(lengths.sum()) / ROW) * ROW for lengths in (LENGTHS, ANSWER_LENGTHS)]
    assert [seen[stack][:2] for stack in stacks] == [(1, row) for row in rows]
    assert set(biases) == ({(64, 64), (32, 32)} if "T5" in family else set())


@pytest.mark.parametrize("family", ["ViT", "Dinov2", "ViTMSN", "Beit"])
def test_images(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**OF_IMAGES)
    padded, free = twins(AutoModelForImageClassification, config)
    assert remove_padding(free) == ""
    pixels = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def result(model: Any) -> tuple[float, torch.Tensor]:
        return backward(model, cross_entropy(model(pixel_values=pixels).logits, torch.arange(5) % 3))

    assert_alike(result(padded), result(free))


@pytest.mark.parametrize("family", ["Llama", "T5", "Bart"])
def test_text_is_generated_as_before(family: str) -> None:
    """With a cache, which has padding; and in between the model trains on."""
    if family in PAIRED:
        padded, free = paired(family)
    else:
        padded, free = twins(AutoModelForCausalLM, transformers.LlamaConfig(**FAMILIES[family]))
    assert remove_padding(free) == ""
    inputs = {"input_ids": IDS[:4].flip(1), "attention_mask": MASK[:4].flip(1)}
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    for _ in range(2):
        assert torch.equal(free.eval().generate(**inputs, **options), padded.eval().generate(**inputs, **options))
        results = (model(**inputs, labels=IDS[:4].flip(1)) for model in (free.train(), padded.train()))
        torch.testing.assert_close(*(result.loss for result in results), rtol=1e-5, atol=1e-6)
    assert free(**inputs, labels=IDS[:4]).get("past_key_values") is None


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "Llama", "Mistral"])
def test_long_texts_take_torchs_own_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PLAIN", 16)
    padded, free = pair(family)
    assert remove_padding(free) == ""
    assert_alike(loss_and_gradient(padded), loss_and_gradient(free))


def test_attention_with_dropout_is_right_in_the_mean() -> None:
    """Averaged over many draws, dropped weights leave what all of them give, and so do its gradients."""
    torch.manual_seed(0)
    texts = Texts(torch.arange(24) < torch.tensor([24, 17, 9])[:, None], torch.device("cpu"))
    rows = [torch.randn(1, 2, 64, 8).requires_grad_() for _ in range(3)]
    direction = torch.randn(1, 64, 2, 8) * (torch.arange(64) < texts.tokens)[None, :, None, None]

    def draw(dropout: float) -> list[torch.Tensor]:
        module = SimpleNamespace(padding_free=SimpleNamespace(pairs=lambda _: Pairs(texts, texts)), is_causal=False)
        found, _ = attend(module, *rows, None, dropout=dropout)
        return [found.detach(), *torch.autograd.grad((found * direction).sum(), rows)]

    exact = draw(0.0)
    draws = [draw(0.2) for _ in range(400)]
    for expected, found in zip(exact, map(torch.stack, zip(*draws, strict=True)), strict=True):
        error = found.std(0) / len(draws) ** 0.5
        held = error > 1e-9
        deviations = ((found.mean(0) - expected)[held] / error[held]).abs()
        assert float(deviations.max()) < 6
        assert float(deviations.square().mean()) == pytest.approx(1, abs=0.4)
    torch.testing.assert_close(exact[0], draw(0.0)[0])


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_no_padding_is_computed(family: str) -> None:
    """What the blocks and their attention see is the row of tokens."""
    _, model = pair(family)
    assert remove_padding(model) == ""
    seen: set[torch.Size] = set()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module.in_features == 128]
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, output: seen.add(output.shape[:-1]))
    model(input_ids=IDS, attention_mask=MASK)
    assert len(layers) == 3
    assert seen == {torch.Size([1, math.ceil(int(LENGTHS.sum()) / ROW) * ROW])}
    assert model.config._attn_implementation == IMPLEMENTATION


@pytest.mark.parametrize("family", ["ModernBert", "Mistral"])
def test_a_text_sees_no_other(family: str) -> None:
    _, model = pair(family)
    remove_padding(model)
    before = model(input_ids=IDS, attention_mask=MASK).logits
    others = IDS.clone()
    others[4] = (others[4] * 7) % 497 + 3
    after = model(input_ids=others, attention_mask=MASK).logits
    changed = (before != after).any(1)
    assert changed.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_padding_may_stand_in_front(family: str) -> None:
    padded, free = pair(family)
    remove_padding(free)
    front = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    torch.testing.assert_close(free(**front).logits, padded(**front).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "Llama", "Mistral"])
def test_texts_of_one_length_without_a_mask(family: str) -> None:
    padded, free = pair(family)
    remove_padding(free)
    ids = IDS[[1, 4, 10], :40]
    torch.testing.assert_close(free(input_ids=ids).logits, padded(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [MASK[:1, :5], torch.ones(3, 1), torch.ones(9, 7)], ids=["one", "tokens", "even"])
def test_batches_with_nothing_to_remove(mask: torch.Tensor) -> None:
    padded, free = pair("Bert")
    remove_padding(free)
    inputs = {"input_ids": IDS[: len(mask), : mask.shape[1]], "attention_mask": mask.long()}
    torch.testing.assert_close(free(**inputs).logits, padded(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_alone() -> None:
    _, model = pair("Bert", dropout=0.3)
    remove_padding(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    assert model.training
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["Llama", "T5", "Bart"])
def test_gradient_checkpointing_computes_the_same_again(family: str) -> None:
    (padded, free), result = (paired(family), of_answers) if family in PAIRED else (pair(family), loss_and_gradient)
    remove_padding(free)
    free.gradient_checkpointing_enable()
    assert_alike(result(padded), result(free))


class Mixing(BertLayer):
    """A block that looks at all tokens at once, past its attention."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + hidden_states.mean(1, keepdim=True)


class Counting(BertLayer):
    """A block that knows how many texts there are."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + torch.ones(3, 1, 1)


@pytest.mark.parametrize(
    ("block", "reason"), [(Mixing, "its outputs would differ by"), (Counting, "it does not take a row of tokens")]
)
def test_a_block_that_does_more_is_found_out(block: type[BertLayer], reason: str) -> None:
    padded, model = pair("Bert")
    for one in (padded, model):
        for layer in one.bert.encoder.layer:
            layer.__class__ = block
    assert reason in remove_padding(model)
    inputs = {"input_ids": IDS[:3], "attention_mask": MASK[:3]}
    torch.testing.assert_close(model(**inputs).logits, padded(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.AlbertConfig(**SIZES | {"embedding_size": 32}), "its blocks are not all alike"),
        (transformers.MPNetConfig(**SIZES), "its attention cannot be replaced"),
        (transformers.BertConfig(**SIZES, attn_implementation="eager"), "its attention is to be eager"),
        (transformers.OPTConfig(**FAMILIES["OPT"], layerdrop=0.1), "it skips blocks at random"),
        (transformers.BartConfig(**OF_BART, decoder_layerdrop=0.1), "it skips blocks at random"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else None,
)
def test_who_stays_as_he_was(config: PreTrainedConfig, reason: str) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    before = model.config._attn_implementation
    assert reason in remove_padding(model)
    assert model.config._attn_implementation == before


def test_the_function_is_transformers_own_where_nothing_is_removed() -> None:
    """`attend` without a model behind it is a mistake that is seen at once."""
    with pytest.raises(AttributeError):
        attend(nn.Linear(1, 1), *(torch.zeros(1, 2, 3, 4) for _ in range(3)), None)
