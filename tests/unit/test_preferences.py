"""The losses of preferences: their formulas, what is counted, and that logits need not be there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.job import tiny_tokenizer
from toolkit.compute import fuse_loss, remove_padding
from toolkit.errors import ConfigError
from toolkit.tasks import Preferences, Scores
from toolkit.tasks.preferences import PairBatch, PreferenceLoss

VOCABULARY = 60
PIECES = [[6, 8], [9, 4], [5, 5]]
LOSSES: tuple[PreferenceLoss, ...] = ("dpo", "ipo", "kto", "orpo")
REFERENCE = torch.tensor([[-3.0, -9.0], [0.0, 0.0], [-12.0, -4.0], [-6.0, -8.0]], dtype=torch.float64)


def rows(*numbers: int) -> dict[str, list[Any]]:
    """Pairs, of which the last three tokens of each text are an answer."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(2, VOCABULARY, sum(pieces)).tolist() for pieces in PIECES]
    trained = [[at >= length - 3 for length in pieces for at in range(length)] for pieces in PIECES]
    found = {"input_ids": tokens, "pieces": PIECES, "trained": trained, "bytes": [3, 3, 3], "length": [14, 13, 10]}
    found |= {"id": [7, 8, 9], "number": [3, 0, 2]}
    return {name: [values[number] for number in numbers] for name, values in found.items()}


def task(loss: PreferenceLoss = "dpo", **settings: Any) -> Preferences:
    options = {"beta": 0.3, "pairs": 4, "vocabulary": VOCABULARY} | settings
    made = Preferences(tiny_tokenizer(), loss=loss, **options)
    made.reference = REFERENCE
    return made


def model_of(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config).eval()


def answers(model: Any, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answers, and their tokens, one text at a time."""
    found, lengths = [], []
    for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        text = ids[mask.bool()][None]
        logs = model(input_ids=text).logits[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]
        found.append(logs[-3:].sum())
        lengths.append(3)
    return torch.stack(found).view(-1, 2), torch.tensor(lengths).view(-1, 2)


def expected_losses(loss: str, logs: torch.Tensor, lengths: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """As the papers have them."""
    ratio = logs - reference
    if loss == "dpo":
        return -torch.log(torch.sigmoid(0.3 * (ratio[:, 0] - ratio[:, 1])))
    if loss == "ipo":
        return ((ratio[:, 0] - ratio[:, 1]) / lengths[:, 0] - 1 / (2 * 0.3)) ** 2
    if loss == "kto":
        return (1 - torch.sigmoid(0.3 * ratio[:, 0])) / 2 + (1 - torch.sigmoid(-0.3 * ratio[:, 1])) / 2
    chances = torch.exp(logs / lengths)
    odds = chances / (1 - chances)
    return -torch.log(chances[:, 0]) - 0.3 * torch.log(torch.sigmoid(torch.log(odds[:, 0] / odds[:, 1])))


@pytest.mark.parametrize("loss", LOSSES)
def test_formulas(loss: PreferenceLoss) -> None:
    model, asked = model_of(), task(loss)
    batch = asked.collate(rows(0, 1, 2), empty=False)
    found = asked.loss(model(**batch.inputs), batch)
    reference = REFERENCE[[3, 0, 2]].float()
    expected = expected_losses(loss, *answers(model, batch), reference).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    counts = asked.measure(model(**batch.inputs), batch)
    assert float(counts["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert asked.units(batch) == float(counts["units"]) == 3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sum_over_pairs(loss: PreferenceLoss) -> None:
    """However they lie in micro-batches."""
    model, asked = model_of(), task(loss)
    whole, *parts = (asked.collate(rows(*numbers), empty=False) for numbers in ((0, 1, 2), (1,), (2, 0)))
    of_parts = sum(float(asked.loss(model(**part.inputs), part)) for part in parts)
    assert float(asked.loss(model(**whole.inputs), whole)) == pytest.approx(of_parts, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_logits_and_padding(loss: PreferenceLoss, tied: bool) -> None:
    plain, lean = model_of(tied), model_of(tied)
    assert not fuse_loss(lean, each_text=True)
    assert not remove_padding(lean)
    for model, asked in ((plain, task(loss)), (lean, task(loss, fused=True))):
        batch = asked.collate(rows(0, 1, 2), empty=False)
        model.loss_found = asked.loss(model(**batch.inputs), batch)
        model.loss_found.backward()
    assert float(lean.loss_found) == pytest.approx(float(plain.loss_found), rel=1e-5)
    for (name, one), two in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_filler_does_not_count(loss: PreferenceLoss, fused: bool) -> None:
    model, asked = model_of(), task(loss, fused=fused)
    if fused:
        assert not fuse_loss(model, each_text=True)
    batch = asked.collate(rows(1), empty=True)
    found = asked.loss(model(**batch.inputs), batch)
    found.backward()
    assert float(found) == asked.units(batch) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert not any(float(count) for count in asked.measure(model(**batch.inputs), batch).values())


def test_metrics() -> None:
    """The model is its own reference for one pair of three, which is a tie."""
    model, asked = model_of(), task()
    batch = asked.collate(rows(0, 1, 2), empty=False)
    logs, lengths = answers(model, batch)
    asked.reference = REFERENCE.clone()
    asked.reference[3] = logs[0].detach().double()
    found = asked.metrics(asked.measure(model(**batch.inputs), batch))
    rewards = 0.3 * (logs - asked.reference[[3, 0, 2]].float())
    margins = rewards[:, 0] - rewards[:, 1]
    assert found["reward_margin"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert found["chosen_reward"] == pytest.approx(float(rewards[:, 0].mean()), abs=1e-5)
    assert found["reward_accuracy"] == pytest.approx((float((margins[1:] > 0).sum()) + 0.5) / 3, abs=0.17)
    assert found["likelier"] == pytest.approx(float((logs / lengths).diff(dim=1).lt(0).float().mean()))
    assert found["units"] == 3


def test_label_smoothing() -> None:
    model = model_of()
    batch = task().collate(rows(0, 1, 2), empty=False)
    smooth = task(label_smoothing=0.25)
    logs, _ = answers(model, batch)
    margins = 0.3 * (logs - REFERENCE[[3, 0, 2]].float()) @ torch.tensor([1.0, -1.0])
    expected = -(0.75 * F.logsigmoid(margins) + 0.25 * F.logsigmoid(-margins)).sum()
    assert float(smooth.loss(model(**batch.inputs), batch)) == pytest.approx(float(expected), rel=1e-5)
    assert smooth.smooths_labels
    plain = task().measure(model(**batch.inputs), batch)["loss"]
    assert float(smooth.measure(model(**batch.inputs), batch)["loss"]) == pytest.approx(float(plain))
    with pytest.raises(ConfigError, match=r"label_smoothing has no effect on the loss ipo"):
        task("ipo", label_smoothing=0.25)


def test_a_certain_answer_has_finite_odds() -> None:
    asked = task("orpo")
    logits = torch.full((2, 14, VOCABULARY), -1e4)
    batch = asked.collate(rows(2), empty=False)
    logits = torch.full((*batch.labels.shape, VOCABULARY), -1e4)
    logits.scatter_(2, batch.labels.clamp(min=0)[..., None], 1e4).requires_grad_()
    found = asked.loss(type("Outputs", (), {"logits": logits}), batch)
    found.backward()
    assert math.isfinite(float(found))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_scores_are_kept_by_the_number_of_the_pair() -> None:
    model = model_of()
    scores = Scores(task())
    for numbers, empty in (((1, 2), False), ((0,), True)):
        batch = scores.collate(rows(*numbers), empty=empty)
        counts = scores.measure(model(**batch.inputs), batch)
    logs, _ = answers(model, scores.collate(rows(0, 1, 2), empty=False))
    assert scores.seen[:, 0].tolist() == [1, 0, 1, 0]
    assert scores.table[[0, 2]].tolist() == [pytest.approx(each, rel=1e-5) for each in logs[[1, 2]].tolist()]
    assert not scores.table[[1, 3]].any()
    assert scores.metrics(counts) == {"units": 0}


def test_a_row_that_is_no_pair_is_unfit() -> None:
    asked = task()
    row = {name: values[0] for name, values in rows(0).items()}
    assert asked.problem(row) == ""
    assert asked.problem(row | {"pieces": [14]}) == "it is not two answers"
