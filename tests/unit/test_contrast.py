"""Contrast: the loss by hand, the same gradient in one micro-batch and in several, and what retrieval counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from tests.ranks import on_ranks
from toolkit.tasks import Contrast
from toolkit.tasks.contrast import embed
from toolkit.world import world

TEMPERATURE = 0.2


class Padding:
    pad_token_id = 0


def task() -> Contrast:
    return Contrast(Padding(), temperature=TEMPERATURE, vocabulary=40)


def sample(number: int, *, negative: bool = False, positive_key: int | None = None) -> dict[str, Any]:
    """A pair of texts of different lengths, drawn from its number."""
    generator = torch.Generator().manual_seed(number)
    pieces = [3 + number % 4, 6 - number % 3, *([4] if negative else [])]
    tokens = torch.randint(1, 40, (sum(pieces),), generator=generator).tolist()
    keys = [10 * number + 1, 10 * number + 2 if positive_key is None else positive_key, 10 * number + 3]
    return {"input_ids": tokens, "pieces": pieces, "keys": keys[: len(pieces)], "length": len(tokens), "id": number}


SAMPLES = [sample(number, negative=number % 3 == 0) for number in range(6)]
SAMPLES[4] = sample(4, positive_key=SAMPLES[2]["keys"][1])  # the same text as the positive of another pair


def columns(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in samples] for name in samples[0]}


def tiny(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(
        BertConfig(vocab_size=40, intermediate_size=32, **sizes, **rates, initializer_range=0.5),
        add_pooling_layer=False,
    ).train()


def learn(groups: list[list[int]], dropout: float = 0.0, rank: int = 0) -> tuple[float, torch.Tensor]:
    """Loss of a step of such micro-batches, and its gradient, both summed over this rank's."""
    model, contrast = tiny(dropout), task()
    batches: list[Any] = [contrast.collate(columns([SAMPLES[i] for i in group or [0]]), not group) for group in groups]
    torch.manual_seed(7)
    contrast.survey(batches, lambda batch: model(**batch.inputs), world())
    total = 0.0
    for batch in batches:
        loss = contrast.loss(model(**batch.inputs), batch)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def by_hand(model: Any) -> torch.Tensor:
    """The definition, a pair at a time."""
    batch: Any = task().collate(columns(SAMPLES), False)
    vectors = embed(model(**batch.inputs).last_hidden_state, batch.inputs["attention_mask"], "mean")
    at, texts = 0, []
    for row in SAMPLES:
        texts.append([(key, vectors[at + i]) for i, key in enumerate(row["keys"])])
        at += len(row["keys"])
    loss = torch.zeros(())
    for (_, anchor), (right, positive), *_ in texts:
        found = [v for other in texts for key, v in other[1:] if key != right]
        logits = torch.stack([positive, *found]) @ anchor / TEMPERATURE
        loss = loss - logits.log_softmax(0)[0]
    return loss


def test_the_loss_by_hand() -> None:
    model = tiny()
    expected = by_hand(model)
    expected.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    loss, found = learn([[0, 1, 2, 3, 4, 5]])
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3, 4, 5]], [[5], [4], [3], [2], [1], [0]], [[0, 1, 2, 3, 4, 5], []]])
def test_micro_batches_change_nothing(groups: list[list[int]]) -> None:
    loss, gradient = learn([[0, 1, 2, 3, 4, 5]])
    found, its = learn(groups)
    assert found == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(its, gradient, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_same_when_texts_are_computed_again() -> None:
    model, contrast = tiny(0.3), task()
    batch: Any = contrast.collate(columns(SAMPLES), False)
    torch.manual_seed(7)
    plain = contrast.loss(model(**batch.inputs), batch)  # without a survey: through the graph of one forward
    plain.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    loss, found = learn([[0, 1, 2, 3, 4, 5]], dropout=0.3)
    assert loss == pytest.approx(float(plain.detach()), rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)


def _on_a_rank() -> tuple[float, list[float]]:
    here = world()
    here.connect()
    shares = {0: [[0, 5], [2]], 1: [[1, 3, 4], []], 2: [[], []]}  # one rank has nothing
    loss, gradient = learn(shares[here.rank])
    total = here.sum(torch.tensor([loss], dtype=torch.float64))
    here.sum(gradient)
    here.close()
    return float(total), gradient.tolist()


def test_ranks_change_nothing() -> None:
    loss, gradient = learn([[0, 1, 2, 3, 4, 5]])
    for found, its in on_ranks(_on_a_rank, 3):
        assert found == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(torch.tensor(its), gradient, rtol=1e-4, atol=1e-5)


class Outputs:
    """Vectors as a model of one token a text would give them."""

    def __init__(self, vectors: list[list[float]]) -> None:
        self.last_hidden_state = torch.tensor(vectors).unsqueeze(1)


def retrieve(pairs: list[tuple[list[float], list[float], int]]) -> dict[str, Any]:
    """The metrics for anchors, positives and the keys of the positives."""
    contrast = task()
    rows = [
        {"input_ids": [1, 1], "pieces": [1, 1], "keys": [1000 + number, key], "length": 2, "id": number}
        for number, (_, _, key) in enumerate(pairs)
    ]
    batch = contrast.collate(columns(rows), False)
    counts = contrast.measure(Outputs([vector for pair in pairs for vector in pair[:2]]), batch)
    return contrast.metrics(counts | contrast.conclude(world()))


def test_what_retrieval_counts() -> None:
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    found = retrieve([(east, east, 1), (north, north, 2), (east, west, 3)])
    assert found["recall_at_1"] == pytest.approx(2 / 3)
    assert found["recall_at_10"] == 1
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, -1.0]]) / TEMPERATURE
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, torch.arange(3))), rel=1e-6)
    assert found["units"] == 3


def test_a_text_that_stands_twice_is_one_candidate() -> None:
    east, north = [1.0, 0.0], [0.0, 1.0]
    assert retrieve([(east, east, 1), (east, east, 1), (north, north, 2)])["recall_at_1"] == 1


def test_vectors_that_are_all_alike_find_nothing() -> None:
    assert retrieve([([1.0, 1.0], [1.0, 1.0], key) for key in range(20)])["recall_at_10"] == 0


def test_what_is_no_pair() -> None:
    contrast = Contrast(Padding(), vocabulary=40, positions=6)
    assert contrast.problem(sample(1)) == ""
    assert "do not add up" in contrast.problem(sample(1) | {"pieces": [4, 6]})
    assert "of which the model takes 6" in contrast.problem(sample(1) | {"pieces": [1, 8]})
    assert "token id 99" in contrast.problem(sample(1) | {"input_ids": [99, *sample(1)["input_ids"][1:]]})
