"""Virtual tokens: the model computes as PEFT's around it does, and all that looks into it finds what it knows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.parity.job import Recording, RecordingTexts, tiny_bert, tiny_data, tiny_gpt2, tiny_llama, tiny_texts
from toolkit.adapters import adapter_of, add_adapter, left_out
from toolkit.compute import checkpoint_activations, fuse_loss, remove_padding
from toolkit.compute.cross_entropy import IGNORED
from toolkit.compute.padding_free import short_texts
from toolkit.config import AdapterConfig
from toolkit.errors import ConfigError
from toolkit.models import input_limits, parameter_counts
from toolkit.precision import Precision
from toolkit.probe import probe_gradients

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
COUNT = 5
Make = Callable[[], Any]


def tiny_roberta() -> Any:
    torch.manual_seed(7)
    return RobertaForSequenceClassification(
        RobertaConfig(**SMALL, vocab_size=100, max_position_embeddings=34, num_labels=3)
    )


def fronted(make: Make, name: str = "prompt", seed: int = 3, virtual_tokens: int | None = COUNT) -> Any:
    config = AdapterConfig(name=name, virtual_tokens=virtual_tokens)  # type: ignore[arg-type]
    return add_adapter(make(), config, seed=seed).eval()


KINDS = [
    *(pytest.param("prompt", make, id=f"prompt-{make.__name__}") for make in (tiny_bert, tiny_roberta)),
    *(
        pytest.param(name, make, id=f"{name}-{make.__name__}")
        for name in ("prompt", "prefix")
        for make in (tiny_llama, tiny_gpt2)
    ),
]


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sum in which each real token, or text, counts otherwise."""
    logits = model(**inputs).logits
    if logits.ndim == 3:
        logits = logits[:, -inputs["input_ids"].shape[1] :][inputs["attention_mask"].bool()]
    weights: torch.Tensor = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return (logits * weights).sum()


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_it_computes_as_pefts_model_does(name: str, make: Make) -> None:
    model = fronted(make, name)
    theirs = peft.get_peft_model(make(), copy.deepcopy(model.peft_config["default"])).eval()
    theirs.prompt_encoder["default"].load_state_dict(model.prompt_encoder.state_dict())
    inputs = short_texts(model.config)
    losses = [loss_of(one, inputs) for one in (model, theirs)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    ours, expected = (m.embedding.weight.grad for m in (model.prompt_encoder, theirs.prompt_encoder["default"]))
    assert expected.abs().max() > 0
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert model(**inputs).logits.shape[:2] in {inputs["input_ids"].shape, (3, 3)}


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_what_is_trained(name: str, make: Make) -> None:
    model, plain = fronted(make, name), make()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if name.startswith("classifier.")}
    assert trained - head == {"prompt_encoder.embedding.weight"}
    assert bool(head) == (make in (tiny_bert, tiny_roberta))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # a tied weight has two
    assert left_out(model) == names - trained
    total, _ = parameter_counts(model)
    keys_and_values = 2 * 2 * (16 if make is tiny_llama else 32)  # two blocks; half of the heads have keys of their own
    width = keys_and_values if name == "prefix" else 32
    assert total == parameter_counts(plain)[0] + COUNT * width
    assert str(adapter_of(model).describe()) == f"{name} of 5 virtual tokens{'; whole: classifier' if head else ''}"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_the_seed_decides(name: str) -> None:
    ones = [fronted(tiny_llama, name, seed).prompt_encoder.embedding.weight for seed in (1, 1, 2)]
    assert torch.equal(ones[0], ones[1])
    assert not torch.equal(ones[0], ones[2])
    assert len(fronted(tiny_llama, name, virtual_tokens=None).prompt_encoder.embedding.weight) == 20


def test_a_prompt_begins_with_words() -> None:
    model = fronted(tiny_llama)
    words = model.get_input_embeddings().weight
    assert all(bool((words == row).all(1).any()) for row in model.prompt_encoder.embedding.weight)


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_padding(name: str, make: Make) -> None:
    model = fronted(make, name)
    inputs = short_texts(model.config)
    padded = loss_of(model, inputs)
    why = remove_padding(model)
    assert why == ("its blocks are given keys and values that no token of a text has" if name == "prefix" else "")
    assert torch.allclose(loss_of(model, inputs), padded, rtol=1e-5)
    if not why:
        tokens = []
        block = next(module for module in model.modules() if type(module).__name__.endswith(("Layer", "Block")))
        block.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape))
        model(**inputs)
        assert tokens == [(1, 32, 32)]  # 2 + 9 + 5 tokens and three times 5 virtual ones, with a filler


@pytest.mark.parametrize("each_text", [False, True])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_loss_without_logits(name: str, each_text: bool) -> None:
    model = fronted(tiny_llama, name)
    inputs = short_texts(model.config)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, :-1] = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, IGNORED)
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(1)
    expected = losses if each_text else losses.sum()[None]
    assert fuse_loss(model, each_text=each_text) == ""
    assert torch.allclose(model(**inputs, labels=labels).logits, expected, rtol=1e-5)
    assert model(**inputs).logits.shape == logits.shape


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_blocks_that_are_computed_again(make: Make, kind: Any) -> None:
    gradients = []
    for again in (False, True):
        model = fronted(make).train()
        if again:
            assert checkpoint_activations(model, kind) == 2
        loss_of(model, short_texts(model.config)).backward()  # type: ignore[no-untyped-call]
        gradients.append(model.prompt_encoder.embedding.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("name", "make"), KINDS)
def test_the_probe_finds_a_gradient(name: str, make: Make) -> None:
    model = fronted(make, name)
    if model.get_output_embeddings() is None:
        task, data = Recording(), tiny_data()
    else:
        task, data = RecordingTexts(fused=False), tiny_texts()
    task.seen.append([])
    probe_gradients(model, task, task.collate(data[:6], empty=False), Precision("fp32"))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@torch.no_grad()
def test_texts_are_continued_alike_behind_padding_and_from_a_cache(name: str, make: Make) -> None:
    model = fronted(make, name)
    inputs = short_texts(model.config)
    ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1).tolist()
    padded = torch.stack([row.roll(9 - length) for row, length in zip(ids, lengths, strict=True)])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = inputs["attention_mask"].flip(1)
    found = model.generate(
        input_ids=padded, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    for row, length in enumerate(lengths):
        whole = found.sequences[row : row + 1, 9 - length :]
        expected = model(input_ids=whole).logits[0, length - 1 : -1]
        logits = torch.stack([step[row] for step in found.logits])
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-6)


def test_the_places_that_are_left() -> None:
    for make in (tiny_bert, tiny_gpt2, tiny_roberta):
        model = fronted(make)  # of 32 positions
        assert input_limits(model, 27)["positions"] == 27
        with pytest.raises(ConfigError, match="in front of texts of --data.max_length 28 tokens are beyond") as caught:
            input_limits(model, 28)
        assert caught.value.remedy == "Use --data.max_length 27."
    assert input_limits(fronted(tiny_llama), 28)["positions"] == 28  # it computes any number of them
    with pytest.raises(ConfigError, match="--adapter.virtual_tokens 24 leaves no room") as caught:
        fronted(tiny_bert, virtual_tokens=24)
    assert caught.value.remedy == "Use 23 at most."
    fronted(tiny_bert, virtual_tokens=23)


REFUSED = {
    "prefix of an encoder": ("prefix", tiny_bert, "keeps no keys and values"),
    "two texts": (
        "prompt",
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
        "does not read one text",
    ),
    "images": (
        "prompt",
        lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=16)),
        "does not read one text",
    ),
    "a decoder that classifies": (
        "prompt",
        lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, vocab_size=100, pad_token_id=0, num_labels=3)),
        "looks for the end of a text in its token ids",
    ),
    "a window": (
        "prefix",
        lambda: MistralForCausalLM(
            MistralConfig(**SMALL, vocab_size=100, num_key_value_heads=2, head_dim=8, sliding_window=16)
        ),
        "looks back no further than a window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_given_any(case: str) -> None:
    name, make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        fronted(make, name)  # type: ignore[arg-type]
    assert "lora" in caught.value.remedy
