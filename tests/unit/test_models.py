"""Models: where they come from, what is drawn, switched off or frozen in them, and what a wrong one gets."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from tests.parity.job import tiny_tokenizer
from toolkit.config import ModelConfig
from toolkit.errors import ConfigError, ModelError
from toolkit.models import freeze, load_classifier, load_tokenizer, locate, parameter_counts, repeated_blocks

LABELS = ["no", "perhaps", "yes"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
NETWORKS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES, max_position_embeddings=32),
    "distilbert": DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100, max_position_embeddings=32
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, n_positions=32, pad_token_id=0),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "t5": T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        vocab_size=100,
        decoder_start_token_id=0,
    ),
    "bart": BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=100,
        max_position_embeddings=34,
        encoder_layerdrop=0.1,
    ),
    "deberta": DebertaV2Config(**SIZES, max_position_embeddings=32),
}
BLOCKS = {
    "bert": ("BertLayer", 2),
    "distilbert": ("TransformerBlock", 2),
    "gpt2": ("GPT2Block", 3),
    "llama": ("LlamaDecoderLayer", 2),
    "t5": ("T5Block", 5),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with `config.json` alone for each network."""
    root = tmp_path_factory.mktemp("networks")
    for name, network in NETWORKS.items():
        network.save_pretrained(root / name)
    return {name: root / name for name in NETWORKS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model: a BERT with five classes, and a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(11)
    BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32, num_labels=5)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def random(folder: Path, seed: int = 0, **options: Any) -> nn.Module:
    return load_classifier(ModelConfig(name=str(folder), init="random", **options), LABELS, seed=seed)


def pretrained(folder: Path | str, seed: int = 0, **options: Any) -> nn.Module:
    return load_classifier(ModelConfig(name=str(folder), **options), LABELS, seed=seed)


def rates(model: nn.Module) -> dict[str, float]:
    """Every probability that the modules of a network will use, by module and attribute."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            found[name] = module.p
        found |= {
            f"{name}.{key}": value
            for key, value in vars(module).items()
            if key in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob")
            and isinstance(value, float)
        }
    return found


# Where they come from.


def test_sample() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    model = load_classifier(ModelConfig(), LABELS, seed=1)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}  # type: ignore[union-attr]
    assert model.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}  # type: ignore[union-attr]
    total, trainable = parameter_counts(model)
    assert total == trainable > 20_000_000
    batch = tokenizer(["a goal in the last minute", "shares fell"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 3)


def test_folder_keeps_its_weights(trained: Path) -> None:
    weights = BertForSequenceClassification.from_pretrained(trained).state_dict()
    for name, tensor in pretrained(trained).state_dict().items():
        assert torch.equal(tensor, weights[name]) or name.startswith("classifier")


def test_relative_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    assert type(pretrained(trained.name)).__name__ == "BertForSequenceClassification"
    assert load_tokenizer(ModelConfig(name=trained.name)).pad_token == "[PAD]"


def test_encoder_without_a_head_gets_one(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32)).save_pretrained(tmp_path)
    assert pretrained(tmp_path).classifier.weight.shape == (3, 32)


def test_head_for_other_classes_is_replaced(trained: Path) -> None:
    model = pretrained(trained)
    assert model.classifier.weight.shape == (3, 32)
    assert model.config.num_labels == 3  # type: ignore[union-attr]
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 3)


def test_network_without_sdpa_works(folders: dict[str, Path]) -> None:
    model = random(folders["deberta"])
    assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 3)


def test_attention_as_asked(folders: dict[str, Path]) -> None:
    for attention, taken in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        assert random(folders["bert"], attention=attention).config._attn_implementation == taken  # type: ignore[union-attr]


# What is drawn.


@pytest.mark.parametrize("source", ["random", "pretrained"])
def test_same_seed_draws_the_same(source: str, folders: dict[str, Path], trained: Path) -> None:
    def load(seed: int) -> dict[str, torch.Tensor]:
        model = random(folders["gpt2"], seed) if source == "random" else pretrained(trained, seed)
        return model.state_dict()

    first = load(5)
    torch.rand(7)  # what happened in between has no say
    again, other = load(5), load(6)
    head = "score.weight" if source == "random" else "classifier.weight"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[head], other[head])


def test_pretrained_body_does_not_depend_on_the_seed(trained: Path) -> None:
    first, other = (pretrained(trained, seed=seed).bert.state_dict() for seed in (5, 6))
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())


# Dropout.


@pytest.mark.parametrize("dropout", [0.0, 0.37])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5", "bart"])
def test_dropout_reaches_every_rate(name: str, dropout: float, folders: dict[str, Path]) -> None:
    model = random(folders[name], dropout=dropout)
    assert len(rates(model)) >= 2
    assert set(rates(model).values()) == {dropout}


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5", "bart"])
def test_dropout_0_makes_training_repeatable(name: str, folders: dict[str, Path]) -> None:
    # The last two are where T5 and BART look for the end of the text.
    batch = {"input_ids": torch.tensor([[5, 6, 7, 2, 1]]), "labels": torch.tensor([1])}
    for dropout, repeatable in ((0.0, True), (0.5, False)):
        model = random(folders[name], dropout=dropout).train()
        losses = {model(**batch).loss.item() for _ in range(4)}
        assert (len(losses) == 1) is repeatable


def test_rates_of_the_network_are_kept_where_none_is_asked_for(folders: dict[str, Path]) -> None:
    model = random(folders["distilbert"])
    assert set(rates(model).values()) == {0.1, 0.2}


def test_skipping_whole_layers_is_switched_off_but_never_on(folders: dict[str, Path]) -> None:
    for dropout, layerdrop in ((None, 0.1), (0.0, 0.0), (0.3, 0.1)):
        network: Any = random(folders["bart"], dropout=dropout).config
        assert (network.encoder_layerdrop, network.decoder_layerdrop) == (layerdrop, 0.0)


def test_dropout_reaches_configurations_inside_a_configuration(tmp_path: Path) -> None:
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
    Gemma3Config(text_config=text, vision_config=SIZES | {"image_size": 16, "patch_size": 8}).save_pretrained(tmp_path)
    for dropout in (0.3, 0.0):
        model = random(tmp_path, dropout=dropout)
        network: Any = model.config
        assert network.text_config.attention_dropout == network.vision_config.attention_dropout == dropout
        assert len(rates(model)) >= 2
        assert set(rates(model).values()) == {dropout}


# Freezing.


def test_freeze(folders: dict[str, Path]) -> None:
    model = random(folders["bert"], freeze=("embeddings", r"layer\.0\."))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if "embeddings" in name or "encoder.layer.0." in name
    }
    total, trainable = parameter_counts(model)
    assert 0 < trainable < total
    assert total - trainable == sum(model.get_parameter(name).numel() for name in frozen)


@pytest.mark.parametrize(
    ("patterns", "message", "remedy"),
    [
        (("embedings",), "--model.freeze 'embedings' matches no parameter", "Parameters begin: bert.embeddings"),
        (("embeddings", "nothing"), "--model.freeze 'nothing' matches no parameter", "Parameters begin"),
        (("(",), "--model.freeze '(' is not a regular expression", ""),
        (("",), "--model.freeze leaves nothing to train", "Freeze less."),
        (("bert", "classifier"), "--model.freeze leaves nothing to train", "Freeze less."),
    ],
)
def test_freezing_nothing_or_everything(
    patterns: tuple[str, ...], message: str, remedy: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        random(folders["bert"], freeze=patterns)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_freezing_adds_to_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(model, ["0.weight"])
    freeze(model, ["1.bias"])
    assert parameter_counts(model) == (12, 6)


# Blocks.


@pytest.mark.parametrize("name", BLOCKS)
def test_repeated_blocks(name: str, folders: dict[str, Path]) -> None:
    blocks = repeated_blocks(random(folders[name]))
    kind, count = BLOCKS[name]
    assert [type(block).__name__ for block in blocks] == [kind] * count
    assert len(set(blocks)) == count


def test_repeated_blocks_of_encoder_and_decoder(folders: dict[str, Path]) -> None:
    model = random(folders["t5"])
    transformer: Any = model.transformer
    assert repeated_blocks(model) == [*transformer.encoder.block, *transformer.decoder.block]


def test_lists_inside_of_blocks_and_lists_of_one_are_no_blocks() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})

    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(block() for _ in range(3)),
            "one": nn.ModuleList([nn.Linear(2, 2)]),
            "mixed": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]),
        }
    )
    assert repeated_blocks(model) == list(model["layers"])  # type: ignore[arg-type]
    assert repeated_blocks(nn.Linear(2, 2)) == []


# Wrong ones.


def test_a_name_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for name, message, remedy in (
        (str(file), "is a file", "Name the folder that holds config.json."),
        ("model.safetensors", "is a file", "Name the folder that holds config.json."),
        (str(tmp_path / "nothing"), "there is no such folder", "Check the path."),
        ("./nothing", "there is no such folder", "Check the path."),
        ("~/nothing/here", "there is no such folder", "Check the path."),
        ("runs/bert_cls/001", "there is no such folder", "Check the path."),
        ("sample:bbc-news", "is a data sample, not a model", "sample:minilm"),
    ):
        with pytest.raises(ModelError) as caught:
            locate(name)
        assert f"--model.name {name}" in caught.value.message
        assert message in caught.value.message
        assert remedy in caught.value.remedy
    with pytest.raises(ConfigError, match=r"there is no sample 'minilmm'\. Did you mean 'minilm'"):
        locate("sample:minilmm")


def damage(folder: Path, how: str) -> None:
    """Break a whole model in one way."""
    weights, network = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    if how == "no weights":
        weights.unlink()
    elif how == "half of the weights":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "no weights in the file":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif how == "foreign weights":
        save_file({"encoder.weight": torch.zeros(3)}, weights, metadata={"format": "pt"})
    elif how == "weights of another size":
        network.write_text(json.dumps(json.loads(network.read_text()) | {"intermediate_size": 128}))
    elif how == "one tensor missing":
        tensors = BertForSequenceClassification.from_pretrained(folder).state_dict()
        del tensors["bert.encoder.layer.1.output.dense.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no configuration":
        network.unlink()
    elif how == "broken configuration":
        network.write_text("{")
    elif how == "configuration without a type":
        network.write_text("{}")
    elif how == "unknown type":
        network.write_text('{"model_type": "nobody"}')
    else:
        assert how == "network without a classifier"
        ViTConfig().save_pretrained(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "no model could be loaded from --model.name {}: Error no file named model.safetensors"),
        ("half of the weights", "no model could be loaded from --model.name {}: "),
        ("no weights in the file", "no model could be loaded from --model.name {}: "),
        ("foreign weights", "the weights of --model.name {} lack "),
        ("weights of another size", "the weights of --model.name {} lack "),
        ("one tensor missing", "the weights of --model.name {} lack 1 tensors of the network"),
        ("no configuration", "no model could be loaded from --model.name {}: "),
        ("broken configuration", "no model could be loaded from --model.name {}: "),
        ("configuration without a type", "no model could be loaded from --model.name {}: "),
        ("unknown type", "no model could be loaded from --model.name {}: "),
        ("network without a classifier", "no model could be loaded from --model.name {}: "),
    ],
)
def test_damaged_folder(how: str, message: str, copy: Path) -> None:
    damage(copy, how)
    with pytest.raises(ModelError) as caught:
        pretrained(copy)
    assert caught.value.message.startswith(message.format(copy))
    assert "\n" not in caught.value.message
    assert caught.value.remedy


def test_folder_without_a_tokenizer(copy: Path, folders: dict[str, Path]) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    for folder in (copy, *folders.values()):
        with pytest.raises(ModelError, match=r"no tokenizer could be loaded from --model\.name"):
            load_tokenizer(ModelConfig(name=str(folder)))


def test_tokenizer_without_padding(copy: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match="has no padding token") as caught:
        load_tokenizer(ModelConfig(name=str(copy)))
    assert "tokenizer_config.json" in caught.value.remedy


def test_revision_of_a_folder_or_a_sample_has_no_effect(trained: Path) -> None:
    for name in (str(trained), "sample:minilm"):
        config = ModelConfig(name=name, revision="main")
        for load in (load_tokenizer, lambda config: load_classifier(config, LABELS, seed=0)):
            with pytest.raises(ConfigError, match=r"--model\.revision has no effect"):
                load(config)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port where nobody listens, and an empty cache of it."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
def test_hub_name_without_a_network() -> None:
    for name in ("no-such-model-here", "nobody/no-such-model-here"):
        began = time.monotonic()
        for load in (load_tokenizer, lambda config: load_classifier(config, LABELS, seed=0)):
            with pytest.raises(ModelError) as caught:
                load(ModelConfig(name=name))
            assert f"could be loaded from --model.name {name}: " in caught.value.message
            assert "Name a folder" in caught.value.remedy
            assert "sample:minilm" in caught.value.remedy
        assert time.monotonic() - began < 30


class NobodyHere(BaseHTTPRequestHandler):
    """A hub that knows no model."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def test_hub_that_has_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), NobodyHere) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        for revision, named in ((None, ""), ("v2", " with revision v2")):
            with pytest.raises(ModelError) as caught:
                load_tokenizer(ModelConfig(name="nobody/asked-for-this", revision=revision))
            assert caught.value.message.startswith(f"the hub has no model nobody/asked-for-this{named} for you: ")
            assert "sample:minilm" in caught.value.remedy
        hub.shutdown()


def test_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.models.HUB_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ModelError, match="could be loaded from --model.name nobody/waits-for-this"):
            load_tokenizer(ModelConfig(name="nobody/waits-for-this"))
        assert time.monotonic() - began < 5


def test_name_that_no_hub_can_have() -> None:
    with pytest.raises(ModelError, match="the hub has no model a b for you: "):
        load_tokenizer(ModelConfig(name="a b"))
