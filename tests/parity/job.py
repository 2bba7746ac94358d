"""A small but real training job that runs under any strategy, and says what each rank did."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from toolkit.adapters import add_adapter, left_out
from toolkit.compute import fuse_loss, keep_less, multiply_in_fp8, remove_padding
from toolkit.config import AdapterConfig, OptimConfig, Quantization, StrategyConfig
from toolkit.data.loader import Loader, batch_shape
from toolkit.engine import evaluate, train_step
from toolkit.optim import adamw, build_schedule
from toolkit.precision import Precision
from toolkit.quantization import is_quantized
from toolkit.strategies import Strategy, choose_low_bit, choose_strategy
from toolkit.tasks import Batch, Classification, LanguageModeling
from toolkit.world import world

CLASSES = 3
# The global batch divides by 1, 2, 3 and 4 ranks and 2 accumulations. The epoch's steps are of 24, 24 and 5 samples, so
# that the last is dealt unequally; `RAGGED` makes it one sample, so that all ranks but the first get a filler.
SAMPLES = 53
RAGGED = 49
GLOBAL_BATCH = 24
STEPS = 8


@dataclass(frozen=True)
class Job:
    strategy: str = "single"
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    precision: str = "fp32"
    dropout: float = 0.0
    steps: int = STEPS
    lr: float = 1e-3
    max_grad_norm: float | None = 1.0
    frozen: str = ""
    adapter: AdapterConfig = AdapterConfig()
    leave_out: bool = False
    """The base, from what is saved, as a run does."""
    quantization: Quantization = "none"
    samples: int = SAMPLES
    loss_scale: float | None = None
    network: str = "bert"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"


@dataclass
class Outcome:
    """What one rank saw."""

    losses: list[float]
    grad_norms: list[float]
    applied: list[bool]
    scales: list[float | None]
    units: list[int]
    seen: list[list[int]]
    evaluation: dict[str, Any]
    weights: dict[str, np.ndarray[Any, Any]]
    effective: dict[str, Any]
    parameter_types: set[str]
    packed: dict[str, str]
    share_of_packed: float


def tiny_bert(dropout: float = 0.0, classes: int = CLASSES, width: int = 32) -> BertForSequenceClassification:
    torch.manual_seed(7)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        vocab_size=100,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=classes,
    )
    return BertForSequenceClassification(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@functools.cache
def tiny_data(samples: int = SAMPLES) -> Dataset:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, CLASSES, samples)
    lengths = generator.integers(4, 20, samples)
    rows = [
        [int(token) for token in generator.integers(2 + 30 * label, 34 + 30 * label, length)]
        for label, length in zip(labels, lengths, strict=True)
    ]
    ids = [1000 + i for i in range(samples)]
    return Dataset.from_dict({"input_ids": rows, "label": labels.tolist(), "length": lengths.tolist(), "id": ids})


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=100,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(7)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32))


@functools.cache
def tiny_texts() -> Dataset:
    """The rows of `tiny_data`, each in two pieces."""
    rows = tiny_data()
    pieces = [[1 + length // 3, length - 1 - length // 3] for length in rows["length"]]
    return rows.remove_columns("label").add_column("pieces", pieces).add_column("bytes", rows["length"][:])


class Recording(Classification):
    """Classification that notes which samples this rank really computed a loss for."""

    def __init__(self) -> None:
        super().__init__([f"class {i}" for i in range(CLASSES)], tiny_tokenizer())
        self.seen: list[list[int]] = []

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        self.seen[-1].extend(batch.ids)
        return super().loss(outputs, batch)


class RecordingTexts(LanguageModeling):
    """The same of texts."""

    def __init__(self, fused: bool) -> None:
        super().__init__(tiny_tokenizer(), vocabulary=100, fused=fused)
        self.seen: list[list[int]] = []

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled():  # an evaluation measures with it too
            self.seen[-1].extend(batch.ids)
        return super().loss(outputs, batch)


def make(job: Job) -> tuple[nn.Module, Recording | RecordingTexts, Dataset]:
    """The model, what it is trained for, and on which rows; a language model plain, or as its recipe makes it."""
    if "bert" in job.network:
        width = 64 if job.network == "wide bert" else 32
        return tiny_bert(job.dropout, width=width), Recording(), tiny_data(job.samples)
    model, lean = tiny_llama(), job.network == "llama without logits or padding"
    if lean:
        assert [fuse_loss(model), remove_padding(model)] == ["", ""]
        assert keep_less(model) > 0
    return model, RecordingTexts(lean), tiny_texts()


def train(job: Job) -> Outcome:
    """Run `job` on this rank of the world that the environment describes."""
    w = world()
    w.connect()
    shape = batch_shape(GLOBAL_BATCH, GLOBAL_BATCH // w.size // job.accumulate, w.size)
    assert shape.accumulation == job.accumulate
    strategy = choose_strategy(
        StrategyConfig(name=job.strategy, **job.options),  # type: ignore[arg-type]
        world=w,
        precision=Precision(job.precision),
        shape=shape,
        max_grad_norm=job.max_grad_norm,
    )
    low_bit = choose_low_bit(strategy, job.quantization, job.adapter.name)
    model, task, data = make(job)
    for name, parameter in model.named_parameters():
        if job.frozen and name.startswith(job.frozen):
            parameter.requires_grad_(False)
    model = add_adapter(model, job.adapter, seed=5, low_bit=low_bit)
    if job.precision == "fp8":
        multiply_in_fp8(model, w.device)
    if job.leave_out:
        strategy.left_out = left_out(model)
    optim = OptimConfig(name=job.optimizer, lr=job.lr, schedule="cosine", warmup_steps=2)
    strategy.setup(model, lambda wrapped: adamw(wrapped, optim, job.adapter.lr_ratio or 1.0))
    del model
    if job.loss_scale:
        strategy.scaler.scale = job.loss_scale  # type: ignore[attr-defined]
    schedule = build_schedule(optim, job.steps)
    loader = Loader(data, task.collate, shape, rank=w.rank, seed=5)
    results = []
    for step in loader.steps(job.steps):
        task.seen.append([])
        results.append(train_step(strategy, task, step, learning_rate=schedule(step.number), seed=5))
    evaluation = evaluate(strategy, task, Loader(data, task.collate, shape, rank=w.rank))
    outcome = Outcome(
        losses=[r.loss for r in results],
        grad_norms=[r.grad_norm for r in results],
        applied=[r.applied for r in results],
        scales=[r.loss_scale for r in results],
        units=[r.units for r in results],
        seen=task.seen,
        evaluation=evaluation,
        weights={name: tensor.numpy() for name, tensor in strategy.weights().items()},
        effective=strategy.effective(),
        parameter_types={type(p).__name__ for p in strategy.module.parameters()},
        packed=digests(strategy),
        share_of_packed=share_of_packed(strategy),
    )
    strategy.teardown()
    w.close()
    return outcome


def packed_weights(strategy: Strategy) -> dict[str, Any]:
    """Of quantized layers, as this rank holds them."""
    return {name: module.weight for name, module in strategy.module.named_modules() if is_quantized(module)}


def digests(strategy: Strategy) -> dict[str, str]:
    """SHA-256 of the bytes of each quantized layer, whole again."""
    found = {}
    for name, weight in packed_weights(strategy).items():
        if hasattr(weight, "ds_shape"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                whole = weight.detach().clone()
        else:
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
        found[name] = hashlib.sha256(whole.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def share_of_packed(strategy: Strategy) -> float:
    """Bytes of quantized weights on this rank, of all; 1 where there are none."""
    held = total = 0
    for weight in packed_weights(strategy).values():
        if hasattr(weight, "ds_shape"):
            held, total = held + weight.ds_tensor.numel(), total + weight.ds_numel
        else:
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            held, total = held + local.numel(), total + weight.numel()
    return held / total if total else 1.0
