"""Runs as a session leaves them, as far as their checkpoints go: trained by real ranks, written by the real saver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from toolkit.checkpoint.export import write_base
from toolkit.checkpoint.saver import Saver
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.tensors import read_tensors
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import Strategy, choose_strategy
from toolkit.world import World, world

CHINESE = "今天天气很好，我们去公园散步。"
VALIDATION = {10: 0.9, 20: 0.5, 30: 0.7}

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(CHINESE)), *(f"w{i}" for i in range(80))]


def config() -> BertConfig:
    return BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(_WORDS),
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each Chinese character of a sentence, as BERT's has them."""
    made = Tokenizer(models.WordPiece({word: index for index, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(7)
    return BertForSequenceClassification(config())


def masked() -> BertForMaskedLM:
    """Its output layer is tied to the embeddings."""
    torch.manual_seed(7)
    return BertForMaskedLM(config())


MODELS = {"classifier": classifier, "masked": masked}


def write_run(
    run: Path, strategy_name: str, kind: str = "classifier", steps: tuple[int, ...] = (10, 20, 30)
) -> dict[str, np.ndarray[Any, Any]]:
    """Train on this rank and save after each step of `steps`; the weights at the end, as the strategy gathers them."""
    w, strategy = _begin(strategy_name, kind)
    if w.main:
        run.mkdir(parents=True, exist_ok=True)
        write_base(MODELS[kind](), tokenizer(), run / "base")
        (run / "config.yaml").write_text("data:\n  max_length: 16\n", encoding="utf-8")
    saver = Saver(Store(run), strategy, w, attempt=1, keep=10, keep_best=True, asynchronous=False)
    for step in steps:
        _train(strategy, step)
        saver.save(_manifest(strategy, step), {"rng": {}})
    weights = {name: tensor.numpy() for name, tensor in strategy.weights().items()}
    strategy.teardown()
    w.close()
    return weights


def pass_on(checkpoint: Path, run: Path, strategy_name: str) -> None:
    """Read a checkpoint under another strategy, and write it as that strategy holds it."""
    w, strategy = _begin(strategy_name, "classifier")
    read_tensors(checkpoint, strategy.shards())
    strategy.loaded()
    saver = Saver(Store(run), strategy, w, attempt=1, keep=10, keep_best=False, asynchronous=False)
    saver.save(_manifest(strategy, 30), {"rng": {}})
    strategy.teardown()
    w.close()


def _begin(strategy_name: str, kind: str) -> tuple[World, Strategy]:
    w = world()
    w.connect()
    strategy = choose_strategy(
        StrategyConfig(name=strategy_name),  # type: ignore[arg-type]
        world=w,
        precision=Precision("fp32"),
        shape=batch_shape(12, None, w.size),
        max_grad_norm=1.0,
    )
    strategy.setup(MODELS[kind](), lambda wrapped: adamw(wrapped, OptimConfig(lr=1e-2)))
    return w, strategy


def _train(strategy: Strategy, step: int) -> None:
    """One step on tokens that are the same on all ranks, so that every strategy comes to the same weights."""
    ids = torch.randint(5, len(_WORDS), (2, 12), generator=torch.Generator().manual_seed(step))
    with strategy.micro_batch(last=True):
        logits = strategy.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        strategy.backward(logits.float().pow(2).mean() / strategy.world.size)
    strategy.update(1e-2)


def _manifest(strategy: Strategy, step: int) -> dict[str, Any]:
    layouts = strategy.world.gather({name: (s.shape, s.data.dtype) for name, s in strategy.shards().items()})
    tensors = {
        name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for layout in layouts
        for name, (shape, dtype) in layout.items()
    }
    return {
        "step": step,
        "epoch": 0,
        "samples_seen": 12 * step,
        "created": "2030-05-06T07:08:09+00:00",
        "attempt": 1,
        "world": {"ranks": strategy.world.size, "strategy": strategy.name, "precision": "fp32", "device": "cpu"},
        "versions": {"torch": torch.__version__},
        "data_fingerprint": "d" * 16,
        "scaler": strategy.scaler_state(),
        "metrics": {"loss": 1 / step, "validation_loss": VALIDATION.get(step, 1.0)},
        "state": {"step": step},
        "tensors": tensors,
    }
