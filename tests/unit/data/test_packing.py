"""Texts cut and packed: nothing is lost, nothing is predicted twice, and little room is left."""

from __future__ import annotations

import numpy as np
import pytest

from toolkit.data.packing import cut, pack

LENGTHS = {
    "ragged": np.random.default_rng(0).lognormal(5, 1, 3000).astype(np.int64) + 1,
    "short": np.random.default_rng(1).integers(1, 9, 500),
    "long": np.array([5000, 2, 1, 0, 64, 65, 127, 128]),
    "alike": np.full(100, 33),
    "none": np.array([1, 0, 1]),
}


@pytest.mark.parametrize("room", [2, 3, 64])
@pytest.mark.parametrize("name", LENGTHS)
def test_each_token_but_the_first_of_a_text_is_predicted_once(name: str, room: int) -> None:
    lengths = LENGTHS[name]
    pieces = cut(lengths, room)
    assert (pieces.length <= room).all()
    assert (pieces.length >= 2).all(), "one token alone predicts nothing"
    # A piece predicts all of its tokens but the first.
    predicted = [at for begin, n in zip(pieces.start, pieces.length, strict=True) for at in range(begin + 1, begin + n)]
    starts = np.cumsum(lengths) - lengths
    expected = [at for begin, n in zip(starts, lengths, strict=True) for at in range(begin + 1, begin + n)]
    assert predicted == expected
    texts = np.searchsorted(starts, pieces.start, side="right") - 1
    assert (lengths[pieces.text] > 1).all()
    assert (texts[lengths[texts] > 1] == pieces.text[lengths[texts] > 1]).all()


@pytest.mark.parametrize("name", LENGTHS)
def test_each_piece_is_in_one_sequence(name: str) -> None:
    lengths = cut(LENGTHS[name], 64).length
    sequences = pack(lengths, 64)
    assert sorted(piece for sequence in sequences for piece in sequence) == list(range(len(lengths)))
    assert all(lengths[sequence].sum() <= 64 for sequence in sequences)
    assert sequences == sorted(map(sorted, sequences))


def test_the_fullest_sequence_that_has_room_is_taken() -> None:
    # 60, 50 and 40 open one each; 13 fits into that of 50 exactly (14 left), 4 into that of 60.
    assert pack(np.array([4, 13, 40, 50, 60]), 64) == [[0, 4], [1, 3], [2]]


def test_little_room_is_left() -> None:
    lengths = cut(LENGTHS["ragged"], 512).length
    sequences = pack(lengths, 512)
    assert lengths.sum() / (512 * len(sequences)) > 0.99
    # No packing has fewer sequences than the tokens ask for.
    assert len(sequences) <= np.ceil(lengths.sum() / 512) + 1


def test_the_same_again() -> None:
    lengths = cut(LENGTHS["ragged"], 512).length
    assert pack(lengths, 512) == pack(lengths.copy(), 512)
