"""The task of the next token: what is predicted, what is counted, and that packed texts do not see each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.parity.job import tiny_tokenizer
from toolkit.compute import fuse_loss, remove_padding
from toolkit.tasks import LanguageModeling
from toolkit.tasks.language_modeling import IGNORED

VOCABULARY = 100
PIECES = [[5, 3], [9], [2, 2, 6]]

SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
}


def rows(*, change: tuple[int, int] | None = None) -> dict[str, list[Any]]:
    """Three sequences; `change` gives a token of one another id."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(2, VOCABULARY, sum(pieces)).tolist() for pieces in PIECES]
    if change:
        tokens[change[0]][change[1]] = 2 + (tokens[change[0]][change[1]] - 1) % (VOCABULARY - 2)
    return {"input_ids": tokens, "pieces": PIECES, "bytes": [20, 30, 0], "length": [8, 9, 10], "id": [7, 8, 9]}


def task(fused: bool = False, **limits: Any) -> LanguageModeling:
    return LanguageModeling(tiny_tokenizer(), **({"vocabulary": VOCABULARY} | limits), fused=fused)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def test_a_piece_predicts_its_own_next_tokens_alone() -> None:
    batch = task().collate(rows(), empty=False)
    assert batch.inputs["input_ids"].shape == (6, 9)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 3, 9, 2, 2, 6]
    ids, labels = batch.inputs["input_ids"], batch.labels
    for row, length in enumerate([5, 3, 9, 2, 2, 6]):
        assert labels[row, : length - 1].tolist() == ids[row, 1:length].tolist()
        assert set(labels[row, length - 1 :].tolist()) == {IGNORED}
        assert set(ids[row, length:].tolist()) <= {task().padding}
    assert task().units(batch) == 27 - 6
    assert batch.ids == [7, 8, 9]
    assert batch.bytes == 50


def test_a_filler_counts_for_nothing() -> None:
    batch = task().collate(rows(), empty=True)
    assert task().units(batch) == 0
    assert batch.ids == []
    assert batch.bytes == 0
    loss = task().loss(model_of("llama")(**batch.inputs), batch)
    loss.backward()
    assert float(loss) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"input_ids": [1.5, 2]}, "its tokens are not a list of whole numbers"),
        ({"input_ids": [5, VOCABULARY]}, "token id 100 is not among the model's 100"),
        ({"pieces": [1, 2]}, "its pieces do not add up to its tokens"),
        ({"pieces": [2, 0]}, "its pieces do not add up to its tokens"),
        ({"pieces": None}, "its pieces do not add up to its tokens"),
        ({"input_ids": [5] * 40, "pieces": [20, 20]}, ""),
        ({"input_ids": [5] * 40, "pieces": [33, 7]}, "it has a piece of 33 tokens, of which the model takes 32"),
    ],
)
def test_what_cannot_be_trained_on(change: dict[str, Any], problem: str) -> None:
    assert task(positions=32).problem({"input_ids": [5, 6], "pieces": [2]} | change) == problem


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("free", [False, True], ids=["padded", "in a row"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_texts_give_the_loss_and_gradient_of_texts_alone(name: str, free: bool, fused: bool) -> None:
    alone, packed = model_of(name), model_of(name)
    expected = torch.zeros(())
    for tokens, pieces in zip(rows()["input_ids"], PIECES, strict=True):
        for piece in torch.tensor(tokens).split(pieces):
            logits = alone(input_ids=piece[None]).logits[0]
            expected = expected + F.cross_entropy(logits[:-1], piece[1:], reduction="sum")
    expected.backward()
    if fused:
        assert fuse_loss(packed) == ""
    if free:
        assert remove_padding(packed) == ""
    batch = task(fused).collate(rows(), empty=False)
    loss = task(fused).loss(packed(**batch.inputs), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (parameter, one), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < 1e-5, parameter


@pytest.mark.parametrize("free", [False, True], ids=["padded", "in a row"])
@pytest.mark.parametrize("name", MODELS)
def test_a_changed_text_moves_no_other(name: str, free: bool) -> None:
    model = model_of(name)
    if free:
        assert remove_padding(model) == ""
    with torch.no_grad():
        before, after = (
            model(**task().collate(rows(change=change), empty=False).inputs).logits for change in (None, (0, 1))
        )
    # The second token of the first sequence lies in its first piece; the second piece is in the same sequence.
    assert not torch.equal(before[0, 1:5], after[0, 1:5])
    assert torch.equal(before[0, :1], after[0, :1]), "a token behind"
    for row, length in enumerate([3, 9, 2, 2, 6], start=1):
        assert torch.equal(before[row, :length], after[row, :length])


def test_figures() -> None:
    model, counted = model_of("llama"), task()
    batch = counted.collate(rows(), empty=False)
    with torch.no_grad():
        counts = counted.measure(model(**batch.inputs), batch)
        twice = {name: 2 * count for name, count in counts.items()}
    metrics = counted.metrics(twice)
    assert metrics["units"] == 42
    assert metrics["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.1)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] * 42 / math.log(2) / 100)
    assert all(count.dtype == torch.float64 for count in counts.values())
