"""Adapters: what is refused, what they match, what the probe finds, and folders that plain PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.chats import save_chat_model
from tests.parity.job import Recording, tiny_bert, tiny_data, tiny_gpt2, tiny_llama
from toolkit.adapters import READS, adapter_of, add_adapter, check_adapter, fingerprint, left_out, load_adapted
from toolkit.checkpoint.adapted import export_adapter
from toolkit.checkpoint.export import write_base
from toolkit.compute import remove_padding, replace_dropout
from toolkit.config import AdapterConfig, ModelConfig, OptimConfig
from toolkit.decoders import load_decoder
from toolkit.errors import ConfigError, ModelError
from toolkit.models import freeze, input_limits, load_tokenizer, repeated_blocks, width
from toolkit.optim import adamw, set_learning_rate
from toolkit.precision import Precision
from toolkit.probe import probe_gradients
from toolkit.quantization import LowBit
from toolkit.tasks import Batch

NAMES = ("lora", "rslora", "dora", "pissa", "ia3")
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def adapted(model: Any, name: str = "lora", **settings: Any) -> Any:
    rank = {} if name == "ia3" else {"rank": 4}
    return add_adapter(model, AdapterConfig(name=name, **(rank | settings)), seed=5)  # type: ignore[arg-type]


# What is refused.


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rank": 3}, "rank"),
        ({"lr_ratio": 2.0}, "lr_ratio"),
        ({"train": ("x",)}, "train"),
        ({"targets": ("all-linear",)}, "targets"),
        ({"name": "ia3", "rank": 16}, "rank"),
        ({"name": "ia3", "alpha": 1.0}, "alpha"),
        ({"name": "ia3", "dropout": 0.0}, "dropout"),
        ({"name": "ia3", "lr_ratio": 2.0}, "lr_ratio"),
        ({"name": "prompt", "rank": 4}, "rank"),
        ({"name": "prefix", "train": ("x",)}, "train"),
    ],
)
def test_a_setting_that_the_adapter_does_not_read(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"--adapter.{key} has no effect with --adapter.name") as caught:
        check_adapter(AdapterConfig(**settings))
    assert "lora" in caught.value.remedy


@pytest.mark.parametrize("name", ["none", *NAMES, "loftq"])
def test_virtual_tokens_where_there_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="--adapter.virtual_tokens has no effect with --adapter.name") as caught:
        check_adapter(AdapterConfig(name=name, virtual_tokens=3))  # type: ignore[arg-type]
    assert "prompt, prefix" in caught.value.remedy


def test_settings_that_are_read() -> None:
    assert set(READS) == {"none", *NAMES, "loftq", "prompt", "prefix"}
    check_adapter(AdapterConfig(name="prompt", virtual_tokens=3))
    check_adapter(AdapterConfig(name="prefix", virtual_tokens=3))
    check_adapter(AdapterConfig())
    for name in (*NAMES[:4], "loftq"):
        check_adapter(
            AdapterConfig(name=name, rank=2, alpha=1.0, dropout=0.1, targets=("a",), lr_ratio=2.0, train=("b",))  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ()}, "--adapter.targets names nothing"),
        ({"targets": ("auto", "query")}, "--adapter.targets auto stands beside others"),
        ({"targets": ("query", "quary")}, r"'quary' matches no linear layer\. Did you mean 'query'\?"),
        ({"targets": ("LayerNorm",)}, "'LayerNorm' matches no linear layer"),
        ({"targets": ("(",)}, "is not a regular expression"),
        ({"train": ("LayerNrom",)}, r"--adapter.train 'LayerNrom' matches no parameter"),
        ({"name": "pissa", "rank": 33}, "--adapter.rank 33: bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_names_that_nothing_has(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        adapted(tiny_bert(), **settings)
    assert caught.value.remedy or "regular" in message


def test_freezing_beside_an_adapter() -> None:
    model = tiny_bert()
    freeze(model, ["embeddings"])
    with pytest.raises(ConfigError, match="--model.freeze has no effect with --adapter.name lora"):
        adapted(model)


# What matches.


def test_nothing_is_added_where_nothing_is_asked_for() -> None:
    model = tiny_bert()
    assert add_adapter(model, AdapterConfig(), seed=0) is model
    assert adapter_of(model) is None
    assert left_out(model) == frozenset()
    assert all(parameter.requires_grad for parameter in model.parameters())


LLAMA = {"vocab_size": 100, "num_key_value_heads": 4, "pad_token_id": 0}
MODELS = {
    "bert": lambda: (tiny_bert(), {"query", "value"}, {"classifier"}),
    "roberta": lambda: (
        RobertaForSequenceClassification(RobertaConfig(**SMALL, vocab_size=100)),
        {"query", "value"},
        {"classifier"},
    ),
    "deberta": lambda: (
        DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, vocab_size=100)),
        {"query_proj", "value_proj"},
        {"pooler", "classifier"},
    ),
    "distilbert, not in the table": lambda: (
        DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
        {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
        {"pre_classifier", "classifier"},
    ),
    "gpt2, transposed": lambda: (
        GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, pad_token_id=0)),
        {"c_attn"},
        {"score"},
    ),
    "llama": lambda: (
        LlamaForSequenceClassification(LlamaConfig(**SMALL, **LLAMA)),
        {"q_proj", "v_proj"},
        {"score"},
    ),
    "llama, of which no head is new": lambda: (
        LlamaForCausalLM(LlamaConfig(**SMALL, **LLAMA)),
        {"q_proj", "v_proj"},
        set(),
    ),
    "t5": lambda: (
        T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)),
        {"q", "v"},
        set(),
    ),
    "vit, not in the table": lambda: (
        ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=16)),
        None,
        {"classifier"},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_matches_by_itself(kind: str) -> None:
    model, layers, whole = MODELS[kind]()
    blocks = len(repeated_blocks(model))
    adapter = adapter_of(adapted(model))
    assert adapter is not None
    if layers is not None:
        assert {name.rpartition(".")[2] for name in adapter.layers} == layers
    assert len(adapter.layers) >= 2
    assert set(adapter.whole) == whole
    assert len(repeated_blocks(model)) == blocks
    for name, parameter in model.named_parameters():
        part = ".lora_" in name or ".modules_to_save." in name
        assert parameter.requires_grad == part, name
        assert parameter.is_contiguous()


def test_what_matches_as_asked() -> None:
    model = adapted(tiny_bert(), targets=(r"layer\.1\..*(query|dense)",), train=("position_emb", r"embeddings\.Lay"))
    adapter = adapter_of(model)
    assert adapter is not None
    assert adapter.layers == tuple(
        f"bert.encoder.layer.1.{name}"
        for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    )
    assert adapter.whole == ("bert.embeddings.position_embeddings", "bert.embeddings.LayerNorm", "classifier")
    assert adapter.describe() == (
        "lora of rank 4 in 4 layers (1 × query, 3 × dense); whole: bert.embeddings.position_embeddings, "
        "bert.embeddings.LayerNorm, classifier"
    )
    every = adapter_of(adapted(tiny_bert(), targets=("all-linear",)))
    assert every is not None
    assert len(every.layers) == 2 * 6 + 1  # with the pooler, and without the head


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_the_base_and_the_seed_decides(name: str) -> None:
    base = tiny_bert().eval()
    inputs = {"input_ids": torch.arange(2, 26).view(2, 12)}
    one, same, other = (
        add_adapter(tiny_bert(), AdapterConfig(name=name), seed=seed).eval()  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    with torch.no_grad():
        assert torch.allclose(one(**inputs).logits, base(**inputs).logits, atol=1e-6)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    drawn = {key for key, tensor in states[0].items() if not torch.equal(tensor, states[2][key])}
    assert bool(drawn) == (name in ("lora", "rslora", "dora"))
    assert adapter_of(one).fingerprint == fingerprint(base, ["classifier"])  # type: ignore[union-attr]


def test_the_random_numbers_of_others_are_left_alone() -> None:
    model = tiny_bert()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    adapted(model)
    assert torch.equal(torch.rand(4), expected)


def test_what_a_checkpoint_need_not_hold() -> None:
    for name in NAMES:
        model = adapted(tiny_bert(), name)
        out = left_out(model)
        assert "bert.embeddings.word_embeddings.weight" in out
        changed = "bert.encoder.layer.0.attention.self.query.base_layer.weight"
        assert (changed in out) == (name in ("lora", "rslora", "dora"))
        assert not out & {n for n, p in model.named_parameters() if p.requires_grad}


# LoftQ.


def low_bit(make: Any, name: str, quantization: str = "nf4", **settings: Any) -> Any:
    config = AdapterConfig(name=name, rank=8, **settings)  # type: ignore[arg-type]
    return add_adapter(make(), config, seed=5, low_bit=LowBit(quantization)).eval()


@torch.no_grad()
def errors_of_layers(model: Any, base: Any) -> dict[str, float]:
    """Of the outputs of a model's adapted layers, to those of the base in full precision."""
    adapter = adapter_of(model)
    assert adapter is not None
    found, generator = {}, torch.Generator().manual_seed(0)
    for name in adapter.layers:
        plain, layer = base.get_submodule(name), model.get_submodule(name)
        x = torch.randn(64, layer.in_features, generator=generator)
        found[name] = float((layer(x) - plain(x)).norm())
    return found


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
def test_loftq_begins_nearer_to_the_base_in_full_precision(make: Any, quantization: str) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "targets": ("all-linear",), "alpha": 20.0}
    base, lora, loftq = make().eval(), low_bit(make, "lora", **settings), low_bit(make, "loftq", **settings)
    plain, ours = errors_of_layers(lora, base), errors_of_layers(loftq, base)
    assert len(ours) > 6
    assert all(0 < ours[name] < 0.85 * plain[name] for name in ours)
    inputs = {"input_ids": torch.arange(2, 26).view(2, 12)}
    with torch.no_grad():
        answers = [model(**inputs).logits for model in (base, lora, loftq)]
    assert (answers[2] - answers[0]).norm() < 0.85 * (answers[1] - answers[0]).norm()


def test_loftq_takes_the_nearest_product() -> None:
    """What is left of a weight's error are its singular values behind the rank (Eckart and Young 1936)."""
    name = "model.layers.0.mlp.up_proj"
    base, model, begun = tiny_llama(), low_bit(tiny_llama, "lora"), low_bit(tiny_llama, "loftq", targets=("up_proj",))
    weight = base.get_submodule(name).weight.detach()
    rounded = model.get_submodule(name)(torch.eye(32)).T.detach()
    left = weight - begun.get_submodule(name)(torch.eye(32)).T.detach()
    assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(weight - rounded)[8:].norm()), rel=1e-4)
    a, b = (getattr(begun.get_submodule(name), f"lora_{half}").default.weight for half in "AB")
    assert a.norm(dim=1).tolist() == pytest.approx(b.norm(dim=0).tolist(), rel=1e-4)


def test_what_loftq_leaves_is_for_both_bases(tmp_path: Path) -> None:
    """On the plain base, what has not been trained changes nothing; on the rounded one, it answers as in training."""
    source = ModelConfig(name=str(save_chat_model(tmp_path / "model")))
    tokenizer = load_tokenizer(source)
    inputs = {"input_ids": torch.arange(2, 26).view(2, 12)}
    config = AdapterConfig(name="loftq", rank=4, targets=("all-linear",))
    plain, model = (load_decoder(source, tokenizer, 32, seed=0).eval() for _ in range(2))
    add_adapter(model, config, seed=5, low_bit=LowBit("nf4"))
    write_base(model, tokenizer, tmp_path / "base")
    with torch.no_grad():
        for kind in ("begun", "trained"):
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            export_adapter(tmp_path / "base", weights, tmp_path / kind)
            answers = load_adapted(tmp_path / kind, quantized=True)(**inputs).logits
            assert torch.allclose(answers, model(**inputs).logits, atol=1e-5)
            if kind == "begun":
                answers = load_adapted(tmp_path / kind)(**inputs).logits
                assert torch.allclose(answers, plain(**inputs).logits, atol=1e-5)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape)


def test_what_loftq_is_not_for() -> None:
    with pytest.raises(ConfigError, match="loftq without --quantization: it begins with what rounding takes"):
        adapted(tiny_bert(), "loftq")
    with pytest.raises(ConfigError, match="--adapter.rank 33"):
        add_adapter(tiny_bert(), AdapterConfig(name="loftq", rank=33), seed=5, low_bit=LowBit("nf4"))
    model = tiny_bert()
    model.bert.pooler.dense = nn.Linear(9, 9)  # packed, it would fill no whole number
    with pytest.raises(ConfigError, match="nothing is rounded of what --adapter.targets names"):
        add_adapter(model, AdapterConfig(name="loftq", rank=4, targets=("pooler",)), seed=5, low_bit=LowBit("nf4"))


# What others do with the result.


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_dropout(name: str) -> None:
    model = adapted(tiny_bert(dropout=0.1), name, **({} if name == "ia3" else {"dropout": 0.2}))
    limits = input_limits(model, 16)
    assert (limits["vocabulary"], limits["positions"], width(model)) == (100, 16, 32)
    assert remove_padding(model) == ""
    replace_dropout(model)
    probe(model)
    assert {type(module).__module__ for module in model.modules() if "Dropout" in type(module).__name__} == {
        "toolkit.compute.dropout"
    }


def test_the_second_factors_learn_faster() -> None:
    model = adapted(tiny_bert(), train=("embeddings",))
    optimizer = adamw(model, OptimConfig(lr=1e-3, weight_decay=0.1), lr_ratio=16.0)
    set_learning_rate(optimizer, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, (rate, decay) in found.items():
        assert rate == (8.0 if ".lora_B." in name else 0.5), name
        assert decay == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_scales_do_not_decay() -> None:
    model = adapted(tiny_bert(), "ia3")
    groups = adamw(model, OptimConfig()).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.01), (9, 0.0)]


# The probe.


def batch() -> Batch:
    return Recording().collate(tiny_data()[:6], empty=False)


def probe(model: nn.Module, precision: str = "fp32") -> None:
    task = Recording()
    task.seen.append([])
    probe_gradients(model, task, batch(), Precision(precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_probe_finds_nothing_where_all_is_well(name: str, precision: str) -> None:
    model = adapted(tiny_bert(dropout=0.1), name, **({} if name == "ia3" else {"dropout": 0.1}), train=("embeddings",))
    model.classifier.weight.grad = held = torch.ones_like(model.classifier.weight)
    model.eval()
    state = torch.get_rng_state()
    probe(model, precision)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert model.classifier.weight.grad is held
    assert all(p.grad is None for p in model.parameters() if p is not model.classifier.weight)


def test_the_probe_serves_frozen_parts_too() -> None:
    model = tiny_bert()
    freeze(model, ["embeddings", r"layer\.0"])
    probe(model)


def test_a_block_that_is_cut_off() -> None:
    """Whatever lies before it gets no gradient."""
    model = adapted(tiny_bert())
    model.bert.encoder.layer[1].register_forward_hook(
        lambda module, args, output: (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
    )
    with pytest.raises(ModelError, match=r"no gradient comes to what is to be trained: 8 parameters \(bert") as caught:
        probe(model)
    assert "--adapter.targets" in caught.value.remedy
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_depends_on_nothing() -> None:
    model = adapted(tiny_bert())
    model.register_forward_hook(lambda module, args, output: type(output)(logits=output.logits.detach()))
    with pytest.raises(ModelError, match=r"the loss depends on no trainable parameter: 10 parameters"):
        probe(model)


def test_a_layer_that_is_multiplied_by_zero() -> None:
    model = adapted(tiny_bert())
    model.bert.encoder.layer[0].attention.self.value.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(ModelError, match=r"zero everywhere: 2 parameters \(.*query.lora_B.*value.lora_B"):
        probe(model)


def test_a_gradient_that_is_not_finite() -> None:
    model = adapted(tiny_bert())
    model.classifier.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(ModelError, match="the gradient is not finite before the first step"):
        probe(model)


def test_parameters_of_another_type() -> None:
    model = adapted(tiny_bert())
    model.classifier.modules_to_save.default.to(torch.bfloat16)
    model.classifier.register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    with pytest.raises(ModelError, match=r"a gradient of torch.bfloat16 comes to parameters of torch.bfloat16"):
        probe(model)


def test_adapters_of_a_half_precision_base_are_fp32() -> None:
    model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=100)).to(torch.bfloat16)
    adapted(model, train=("LayerNorm",))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
