"""What a batch means: its loss is a sum, its filler counts for nothing, its metrics are scikit-learn's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    NystromformerConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from tests.parity.job import tiny_bert, tiny_tokenizer
from toolkit.models import input_limits
from toolkit.tasks import Batch, Classification

CLASSES = 4
LABELS = tuple("abcd")


@pytest.fixture
def task() -> Classification:
    return Classification(LABELS, tiny_tokenizer())


def batch(labels: Any, *, filler: int = 0) -> Batch:
    """A batch of these labels, and filler rows behind them, with inputs that nobody reads."""
    labels = torch.as_tensor(labels)
    real = len(labels)
    rows = torch.cat([labels, torch.zeros(filler, dtype=torch.long)])
    weights = torch.cat([torch.ones(real), torch.zeros(filler)])
    return Batch({}, rows, weights, list(range(real)))


def outputs(logits: Any) -> Any:
    return SimpleNamespace(logits=torch.as_tensor(logits))


def summed(task: Classification, parts: Iterator[tuple[Any, Batch]]) -> dict[str, torch.Tensor]:
    """The counts of all batches added up, as the engine does over batches and ranks."""
    total: dict[str, torch.Tensor] = {}
    for part, part_batch in parts:
        for name, count in task.measure(part, part_batch).items():
            total[name] = total[name] + count if name in total else count
    return total


# Collating.


def test_collate(task: Classification) -> None:
    rows = {"input_ids": [[5, 6, 7], [8]], "label": [2, 0], "id": [41, 17], "length": [3, 1]}
    found = task.collate(rows, empty=False)
    assert found.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(found.inputs) == {"input_ids", "attention_mask"}
    assert found.labels.tolist() == [2, 0]
    assert found.weights.tolist() == [1.0, 1.0]
    assert found.ids == [41, 17]
    assert task.units(found) == 2
    assert found.to(torch.device("cpu")) is found


def test_collate_pads_on_the_tokenizers_side(task: Classification) -> None:
    task.tokenizer.padding_side = "left"
    found = task.collate({"input_ids": [[5, 6], [8]], "label": [2, 0], "id": [1, 2]}, empty=False)
    assert found.inputs["input_ids"].tolist() == [[5, 6], [0, 8]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_filler_counts_for_nothing(task: Classification) -> None:
    filler = task.collate({"input_ids": [[5, 6, 7]], "label": [2], "id": [41]}, empty=True)
    assert filler.ids == []
    assert task.units(filler) == 0
    model = tiny_bert(classes=CLASSES)
    found = model(**filler.inputs)
    loss = task.loss(found, filler)
    assert loss.item() == 0.0
    loss.backward()
    # It has gone through the whole network all the same, as the other ranks wait for.
    gradients = [parameter.grad for parameter in model.parameters()]
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    counts = task.measure(found, filler)
    assert counts["units"].item() == counts["loss"].item() == counts["confusion"].sum().item() == 0.0


# Samples that cannot be computed on.


FIT = {"input_ids": [5, 6, 7], "label": 2, "id": 41, "length": 3}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"input_ids": []}, "it has no tokens"),
        ({"input_ids": [5] * 33}, "it has 33 tokens, of which the model takes 32"),
        ({"input_ids": [5, 10**6, 7]}, "token id 1000000 is not among the model's 100"),
        ({"input_ids": [100]}, "token id 100 is not among the model's 100"),
        ({"input_ids": [5, 6, -1]}, "token id -1 is not among the model's 100"),
        ({"input_ids": [5, 2**62]}, f"token id {2**62} is not among the model's 100"),
        ({"input_ids": None}, "its tokens are not a list of whole numbers"),
        ({"input_ids": 5}, "its tokens are not a list of whole numbers"),
        ({"input_ids": "5 6 7"}, "its tokens are not a list of whole numbers"),
        ({"input_ids": ["5", "6"]}, "its tokens are not a list of whole numbers"),
        ({"input_ids": [5, None]}, "its tokens are not a list of whole numbers"),
        ({"input_ids": [5.0, 6.0]}, "its tokens are not a list of whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "its tokens are not a list of whole numbers"),
        ({"label": 4}, "label 4 is not among the 4 classes"),
        ({"label": -1}, "label -1 is not among the 4 classes"),
        ({"label": None}, "label None is not among the 4 classes"),
        ({"label": 2.0}, "label 2.0 is not among the 4 classes"),
        ({"label": "b" * 500}, f"label '{'b' * 39} is not among the 4 classes"),
    ],
)
def test_samples_that_cannot_be_computed_on(fault: dict[str, Any], reason: str) -> None:
    task = Classification(LABELS, tiny_tokenizer(), vocabulary=100, positions=32)
    assert task.problem(FIT) == ""
    assert task.problem(FIT | fault) == reason


def test_samples_at_the_limits_can_be_computed_on() -> None:
    task = Classification(LABELS, tiny_tokenizer(), vocabulary=100, positions=32)
    model = tiny_bert(classes=CLASSES)
    for fit in ({"input_ids": [0, 99]}, {"input_ids": [5] * 32}, {"label": 0}, {"label": 3}):
        row = FIT | fit
        assert task.problem(row) == ""
        taken = task.collate({name: [value] for name, value in row.items()}, empty=False)
        assert torch.isfinite(task.loss(model(**taken.inputs), taken))
    assert task.problem(FIT | {"input_ids": np.arange(3), "label": np.int64(1)}) == ""


def test_limits_by_default(task: Classification) -> None:
    assert task.problem(FIT | {"input_ids": [99] * 10_000}) == ""
    assert task.problem(FIT | {"input_ids": [100]}) == "token id 100 is not among the model's 100"
    # One token more, behind a gap: the length of this tokenizer is 101.
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 100)} | {"far": 150}
    far = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="[PAD]")
    assert len(far) == 101
    assert Classification(LABELS, far).problem(FIT | {"input_ids": [150]}) == ""


SMALL = {"vocab_size": 90, "max_position_embeddings": 40, "num_labels": 2, "pad_token_id": 1}
ENCODER = SMALL | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (BertConfig(**ENCODER), 40),
        (RobertaConfig(**ENCODER), 38),
        (MPNetConfig(**ENCODER), 38),
        (NystromformerConfig(**ENCODER, segment_means_seq_len=8, num_landmarks=8), 40),
        (GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2), 40),
        (OPTConfig(**ENCODER, ffn_dim=16, word_embed_proj_dim=16), 40),
        (DebertaV2Config(**ENCODER), 40),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_limits_are_those_of_the_model(config: PreTrainedConfig, longest: int) -> None:
    """The longest sample passes through it, and one token more does not."""
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert input_limits(model, max_length=1000) == {"vocabulary": 90, "positions": longest}
    assert input_limits(model, max_length=20)["positions"] == 20
    ids = torch.full((1, longest), 89)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
        ids = torch.full((1, longest + 1), 89)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    "config",
    [
        DebertaV2Config(**ENCODER, position_biased_input=False, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ModernBertConfig(**ENCODER, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_learned_positions_take_any_length(config: PreTrainedConfig) -> None:
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert input_limits(model, max_length=60) == {"vocabulary": 90, "positions": 60}
    ids = torch.full((1, 60), 89)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_a_batch_keeps_what_was_skipped_wherever_it_goes() -> None:
    moved = replace(batch([1, 2]), skipped=[(7, "bad")]).to(torch.device("meta"))
    assert moved.labels.device.type == "meta"
    assert (moved.ids, moved.skipped) == ([0, 1], [(7, "bad")])


# The loss.


def test_loss_is_the_sum_over_the_samples(task: Classification) -> None:
    logits = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    whole = task.loss(outputs(logits), batch(labels))
    assert whole.shape == ()
    assert whole.dtype == torch.float32
    by_hand = -torch.log_softmax(logits, -1)[range(7), labels].sum()
    assert whole.item() == pytest.approx(by_hand.item(), rel=1e-6)
    parts = sum(task.loss(outputs(logits[i : i + 3]), batch(labels[i : i + 3])) for i in (0, 3, 6))
    assert float(parts) == pytest.approx(whole.item(), rel=1e-6)


def test_loss_in_reduced_precision_is_summed_in_fp32(task: Classification) -> None:
    logits = torch.randn(512, CLASSES, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.arange(512) % CLASSES
    loss = task.loss(outputs(logits), batch(labels))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(task.loss(outputs(logits.double()), batch(labels)).item(), rel=1e-5)


def test_label_smoothing_by_hand_and_in_the_training_loss_only() -> None:
    smooth = Classification(LABELS, tiny_tokenizer(), label_smoothing=0.2)
    sharp = Classification(LABELS, tiny_tokenizer())
    assert smooth.smooths_labels
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 2, 3, 1])
    # Szegedy et al. 2016, section 7: 0.8 of the target on the label and 0.2 spread over all classes.
    target = 0.8 * torch.nn.functional.one_hot(labels, CLASSES) + 0.2 / CLASSES
    expected = -(target * torch.log_softmax(logits, -1)).sum()
    data = batch(labels, filler=2)
    logits = torch.cat([logits, torch.randn(2, CLASSES)])
    assert smooth.loss(outputs(logits), data).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sharp.loss(outputs(logits), data).item() != pytest.approx(expected.item(), rel=1e-3)
    assert smooth.measure(outputs(logits), data)["loss"].item() == pytest.approx(
        sharp.loss(outputs(logits), data).item(), rel=1e-6
    )


# The metrics.


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(seed: int, task: Classification) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, 200)
    logits = generator.normal(size=(200, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    if seed == 1:
        logits[:, 2] = -100.0  # a class that is never predicted
    if seed == 2:
        labels[labels == 3] = 0  # one that is never true
    if seed == 3:
        labels[labels == 3], logits[:, 3] = 0, -100.0  # one that is neither
    if seed == 4:
        labels[:] = 1
    sizes = [1, 7, 32, 60, 100]
    ends = np.cumsum(sizes)

    def parts() -> Iterator[tuple[Any, Batch]]:
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            rows = slice(end - size, end)
            filler = np.full((number, CLASSES), 5.0)  # would be class 0, predicted as class 0
            yield outputs(np.concatenate([logits[rows], filler])), batch(labels[rows], filler=number)
        yield outputs(np.ones((1, CLASSES))), batch(np.array([], dtype=np.int64), filler=1)

    found = task.metrics(summed(task, parts()))
    predicted = logits.argmax(-1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(CLASSES), zero_division=0
    )
    losses = -torch.log_softmax(torch.as_tensor(logits), -1)[range(200), labels]
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_precision"] == pytest.approx(precision.mean())
    assert found["macro_recall"] == pytest.approx(recall.mean())
    assert found["macro_f1"] == pytest.approx(f1.mean())
    assert found["confusion"] == confusion_matrix(labels, predicted, labels=range(CLASSES)).tolist()
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["units"] == 200
    for index, row in enumerate(found["per_class"]):
        assert row == {
            "label": LABELS[index],
            "precision": pytest.approx(precision[index]),
            "recall": pytest.approx(recall[index]),
            "f1": pytest.approx(f1[index]),
            "support": support[index],
        }


def test_metrics_are_plain_numbers(task: Classification) -> None:
    found = task.metrics(task.measure(outputs(torch.eye(CLASSES)), batch(range(CLASSES))))
    kinds = {type(value) for key, value in found.items() if key not in ("confusion", "per_class")}
    assert kinds == {float, int}
    assert {type(cell) for row in found["confusion"] for cell in row} == {int}
    assert {type(value) for row in found["per_class"] for value in row.values()} == {str, float, int}
    assert found["accuracy"] == found["macro_f1"] == 1.0


def test_counts_do_not_depend_on_how_the_samples_lie(task: Classification) -> None:
    """Counts are fp64, so that adding up many batches in another order gives the same figures."""
    logits = torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(64) % CLASSES
    whole = task.measure(outputs(logits), batch(labels))
    singles = summed(task, ((outputs(logits[i : i + 1]), batch(labels[i : i + 1])) for i in range(64)))
    for name, count in whole.items():
        assert count.dtype == torch.float64
        assert torch.allclose(count, singles[name], rtol=1e-6, atol=0)
