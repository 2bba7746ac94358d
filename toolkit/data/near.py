"""Near-duplicates: texts that share most of their words, by MinHash and locality-sensitive hashing.

Texts are compared by the Jaccard similarity of their sets of runs of five words: how many of them both have, of how
many either has. MinHash (Broder 1997) makes a short signature of each set; texts whose signatures agree in a band
(Leskovec, Rajaraman and Ullman: Mining of Massive Datasets, chapter 3) become candidates, and candidates are compared
exactly. So nothing is dropped that is less alike than was asked for, and one in a hundred pairs at the threshold may be
missed, fewer above it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Features, Value
from datasets import Sequence as ListOf
from datasets.utils import tqdm

from toolkit.config import SourcesConfig
from toolkit.data.clean import DROPPED, TRAIN, Keys, Roles
from toolkit.data.contents import Contents, Grams, grams
from toolkit.data.mapping import ROWS_FOR_A_BAR, quiet
from toolkit.errors import ConfigError
from toolkit.requirements import optional

LENGTH = 5
"""Words of a run."""
_VALUES = 128
"""Of a signature: its agreement with another one estimates their similarity within 0.04 (one standard deviation)."""
_MISSED = 0.01
"""Share of pairs at the threshold that may be missed."""
_SEED = 42


@dataclass(frozen=True)
class _Runs:
    """The runs of all texts: `flat[begins[i] : begins[i + 1]]` are those of text i, sorted; and their signatures."""

    flat: npt.NDArray[np.uint32]
    begins: npt.NDArray[np.int64]
    signatures: npt.NDArray[np.uint32]

    def similarity(self, one: int, other: int) -> float:
        """Of Jaccard."""
        first, second = (self.flat[self.begins[text] : self.begins[text + 1]] for text in (one, other))
        shared = len(np.intersect1d(first, second, assume_unique=True))
        return shared / (len(first) + len(second) - shared)


def check_near(config: SourcesConfig) -> None:
    """Refuse what cannot take effect.

    Raises:
        ConfigError: near-duplicates are to go and repeats to stay, or the library is not installed.
    """
    if config.near_duplicates is None:
        return
    if not config.deduplicate:
        raise ConfigError(
            f"--data.near_duplicates {config.near_duplicates:g} contradicts --data.deduplicate False",
            "A repeat is a near-duplicate too: leave one of them out.",
        )
    _library()


def drop_near(contents: Contents, kept: Roles, keys: Keys, threshold: float | None) -> tuple[Roles, dict[str, int]]:
    """Drop training texts that are as good as others, of training or held out, and validation texts as those of test.

    Which of several stays follows from the texts alone: one of a held-out split before one of training, a long one
    before a short one, then by their hashes. In that order each text stays unless it is too much like one that has
    stayed before it; so no two training texts that were compared are alike, and none is dropped without one like it
    that stays. Splits that are given keep their repeats, as everywhere.

    Args:
        contents: of all rows.
        kept: split of each row, or `DROPPED`.
        keys: from `key_texts`.
        threshold: least Jaccard similarity of near-duplicates; None drops nothing.

    Returns:
        The new roles, and how many rows were dropped for which reason.
    """
    if threshold is None:
        return kept, {}
    rows = np.flatnonzero(kept != DROPPED)
    runs = _runs(contents, rows)
    sizes, roles = np.diff(runs.begins), kept[rows]
    order = np.lexsort((keys[rows, 1], keys[rows, 0], -sizes, -roles))
    unlike = _unlike(runs, order[sizes[order] > 0], roles, threshold)
    dropped = np.array([text for text, _ in unlike], np.int64)
    held_out = sum(role != TRAIN for _, role in unlike)
    result = kept.copy()
    result[rows[dropped]] = DROPPED
    return result, {"nearly repeated": len(unlike) - held_out, "nearly in a held-out split": held_out}


def _unlike(runs: _Runs, order: npt.NDArray[np.int64], roles: Roles, threshold: float) -> list[tuple[int, int]]:
    """Texts to drop, each with the role of the one that it is like."""
    buckets = _buckets(runs.signatures, threshold)[order]
    stay: defaultdict[int, list[int]] = defaultdict(list)
    drop = []
    # An estimate that falls short by four standard deviations needs no comparison.
    least = threshold - 4 * math.sqrt(threshold * (1 - threshold) / _VALUES)
    suspects = np.flatnonzero((buckets >= 0).any(axis=1))
    with quiet(bars=len(suspects) >= ROWS_FOR_A_BAR):
        for place in tqdm(suspects, desc="Comparing near-duplicates"):
            text, mine = order[place], buckets[place][buckets[place] >= 0].tolist()
            # Places, so that they are in order, the held-out texts first.
            rivals = order[sorted({rival for bucket in mine for rival in stay[bucket]})]
            rivals = rivals[(roles[rivals] > roles[text]) | (roles[text] == TRAIN)]
            likely = np.mean(runs.signatures[rivals] == runs.signatures[text], axis=1) >= least
            like = next((rival for rival in rivals[likely] if runs.similarity(text, rival) >= threshold), None)
            if like is None:
                for bucket in mine:
                    stay[bucket].append(place)
            else:
                drop.append((int(text), int(roles[like])))
    return drop


def rows_of_a_band(threshold: float) -> int:
    """The most for which a pair at the threshold agrees in all of them, in at least one band, as good as surely."""
    chances = {rows: 1 - (1 - threshold**rows) ** (_VALUES // rows) for rows in range(1, _VALUES + 1)}
    return max(rows for rows, chance in chances.items() if chance >= 1 - _MISSED)


def _buckets(signatures: npt.NDArray[np.uint32], threshold: float) -> npt.NDArray[np.int64]:
    """For each text and band a number that it shares with those of the same values there; −1 where there are none."""
    rows = rows_of_a_band(threshold)
    bands = _VALUES // rows
    result = np.empty((len(signatures), bands), np.int64)
    for band in range(bands):
        values = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        _, bucket, sizes = np.unique(values, axis=0, return_inverse=True, return_counts=True)
        result[:, band] = np.where(sizes[bucket] > 1, bucket + band * len(signatures), -1)
    return result


def _runs(contents: Contents, rows: npt.NDArray[np.int64]) -> _Runs:
    table = contents.measure(rows, _measure, Features({"runs": ListOf(Value("uint32"))}), "Reading runs of words")
    path = contents.scratch / "runs"
    lengths, signatures = [np.zeros(1, np.int64)], np.empty((len(rows), _VALUES), np.uint32)
    minhash, done = _library().RMinHash, 0
    with path.open("wb") as file:
        for batch in table.with_format("arrow").iter(1000):
            for chunk in batch.column("runs").chunks:
                flat, counts = chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy()
                file.write(flat.tobytes())
                begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
                matrix = minhash.digest_matrix_from_flat_token_hashes(flat.astype(np.uint64), begins, _VALUES, _SEED)
                signatures[done : done + len(counts)] = matrix.to_rows()
                lengths.append(counts)
                done += len(counts)
        file.write(np.zeros(1, np.uint32).tobytes())  # what is mapped into memory must not be empty
    return _Runs(np.memmap(path, np.uint32, "r"), np.cumsum(np.concatenate(lengths)), signatures)


def _measure(texts: list[str]) -> dict[str, list[npt.NDArray[np.uint32]]]:
    return {"runs": [_each_once(grams(text, LENGTH, whole=True)) for text in texts]}


def _each_once(runs: Grams) -> npt.NDArray[np.uint32]:
    """Sorted. 32 bits tell the runs of two texts apart well enough, and need half the disk."""
    ordered = np.sort(runs.astype(np.uint32))
    new = np.ones(len(ordered), np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]  # several times as fast as np.unique
    return ordered[new]


def _library() -> Any:
    return optional("rensa", "--data.near_duplicates", "clean")
