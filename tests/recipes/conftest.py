"""A small data set and a tiny model on disk, which recipes read as they read a user's own."""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from tests.recipes.launching import learn, read

Learnt = tuple[list[dict[str, Any]], dict[str, Any]]
"""Metrics and report of a run."""

WORDS = {
    "sport": ["match", "goal", "team", "coach", "season", "league", "striker", "keeper", "penalty", "final"],
    "money": ["market", "share", "profit", "bank", "loan", "bond", "price", "trade", "budget", "dollar"],
    "music": ["album", "song", "band", "guitar", "chart", "concert", "singer", "record", "tour", "drum"],
}
COMMON = ["the", "a", "of", "in", "and", "this", "year", "new", "said", "big", "week", "after", "before", "with"]


@pytest.fixture(scope="session")
def texts_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 different texts of three classes."""
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rng = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(120):
            label = list(WORDS)[number % 3]
            words = rng.choices(WORDS[label], k=rng.randint(3, 8)) + rng.choices(COMMON, k=rng.randint(2, 9))
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a tokenizer, for `--model.init random`."""
    path = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COMMON, *(word for words in WORDS.values() for word in words)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],  # as BERT's
    ).save_pretrained(path)
    BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # so small a network learns nothing in a few steps from the usual 0.02
    ).save_pretrained(path)
    return path


@pytest.fixture
def tiny_job(texts_csv: Path, tiny_model: Path) -> list[str]:
    """Options of a run that takes seconds."""
    return [
        *("--model.name", str(tiny_model), "--model.init", "random", "--model.dropout", "0"),
        *("--data.name", str(texts_csv), "--data.max_length", "32"),
        *("--train.global_batch", "12", "--train.steps", "9", "--optim.lr", "1e-3"),
        *("--precision", "fp32", "--run.log_every", "1"),
    ]


@pytest.fixture
def tiny_base(tiny_model: Path, tmp_path: Path) -> Path:
    """The same with weights, without a head: what an adapter is put on."""
    path = tmp_path / "base model"
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(tiny_model)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture
def adapter_job(tiny_job: list[str], tiny_base: Path) -> list[str]:
    """Options of a run that trains an adapter on it."""
    return [*tiny_job, "--model.name", str(tiny_base), "--model.init", "pretrained", "--adapter.name", "lora"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Learnt]:
    """What a recipe, given its name and its options, learns in one process; each is run once."""

    @functools.cache
    def learnt(name: str, *options: str) -> Learnt:
        folder = tmp_path_factory.mktemp("alone")
        learn(name, 1, [*options, "--run.dir", "run"], folder)
        return read(folder / "run")

    return learnt
