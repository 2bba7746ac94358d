"""Language models from sizes and from weights: how large they are, and what does not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.pretrain_lm import Config
from tests.parity.job import tiny_tokenizer
from toolkit.config import DecoderConfig, from_yaml
from toolkit.decoders import load_decoder
from toolkit.errors import ConfigError, ModelError
from toolkit.models import parameter_counts
from toolkit.samples import fetch

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "pretrain_lm").glob("*.yaml"))
SMALL: dict[str, Any] = {"layers": 2, "hidden_size": 32, "heads": 4}


class Vocabulary:
    """Of so many tokens."""

    bos_token_id = eos_token_id = 0
    pad_token_id = 1

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {"last": self._size - 1}


def test_the_configs_are_there() -> None:
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_has_the_parameters_that_it_says(path: Path) -> None:
    config = from_yaml(Config, path)
    with torch.device("meta"):
        model = load_decoder(config.model, Vocabulary(config.tokenizer.vocabulary), config.data.max_length, seed=0)
    said = re.search(r"([\d,]{9,}) parameters", path.read_text())
    assert said is None or parameter_counts(model)[0] == int(said[1].replace(",", ""))
    assert said or path.stem == "chinese"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_new_network_follows_from_its_seed(architecture: Any) -> None:
    config = DecoderConfig(architecture=architecture, **SMALL)
    one, same, other = (load_decoder(config, tiny_tokenizer_with_end(), 64, seed=seed) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.get_input_embeddings().num_embeddings == 100
    assert one.config.max_position_embeddings == 64
    assert one.config.tie_word_embeddings
    assert one.config.eos_token_id == 1


def tiny_tokenizer_with_end() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[UNK]"
    return tokenizer


def test_dropout_is_set_everywhere() -> None:
    model = load_decoder(DecoderConfig(architecture="gpt2", dropout=0.25, **SMALL), Vocabulary(100), 64, seed=0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_that_are_there(saved: Path) -> None:
    model = load_decoder(DecoderConfig(name=str(saved)), Vocabulary(90), 64, seed=0)
    expected = LlamaForCausalLM.from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tokenizer_that_is_too_large_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer has 101 tokens, and .* embeddings for 100"):
        load_decoder(DecoderConfig(name=str(saved)), Vocabulary(101), 64, seed=0)


@pytest.mark.parametrize("size", [{"layers": 3}, {"architecture": "gpt2"}, {"tie_embeddings": False}, {"kv_heads": 2}])
def test_sizes_of_weights_that_are_there_are_their_own(saved: Path, size: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--model.{next(iter(size))} has no effect"):
        load_decoder(DecoderConfig(name=str(saved), **size), Vocabulary(90), 64, seed=0)


def test_an_encoder_is_no_language_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    with pytest.raises(ModelError, match="tensors of a language model"):
        load_decoder(DecoderConfig(name="sample:minilm"), tokenizer, 64, seed=0)
