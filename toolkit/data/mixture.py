"""Sources of training data in the shares that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from toolkit.config import SourcesConfig
from toolkit.errors import ConfigError, DataError


class Mixture:
    """Rows of a data set, any number of times each, with ids of their own.

    Args:
        dataset: Arrow, with a column `id`.
        rows: numbers of its rows.
    """

    def __init__(self, dataset: Dataset, rows: npt.NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def with_format(self, kind: str) -> Mixture:
        """As of a data set; its columns are arrays anyway."""
        return self

    def __getitem__(self, key: str | Sequence[int]) -> Any:
        """A whole column, or some rows as columns."""
        if key == "id":
            return np.arange(len(self))
        if isinstance(key, str):
            return np.asarray(self._dataset[key])[self._rows]
        return self._dataset[self._rows[key].tolist()] | {"id": list(key)}


def check_weights(config: SourcesConfig) -> None:
    """Raises ConfigError where `weights` is not one for each of several sources."""
    if config.weights and len(config.weights) != len(config.name):
        raise ConfigError(
            f"--data.weights has {len(config.weights)} numbers for the {len(config.name)} sources of --data.name",
            "Give one for each, or none.",
        )
    if len(config.weights) == 1:
        raise ConfigError("--data.weights has no effect on one source", "Leave it out.")


def count_sources(source: Sequence[int], names: Sequence[str]) -> list[int]:
    """Rows of each source.

    Args:
        source: number of the source of each row.
        names: of the sources.

    Raises:
        DataError: one has none.
    """
    counts = np.bincount(np.asarray(source), minlength=len(names))
    if not counts.all():
        missing = names[int(np.argmin(counts))]
        raise DataError(f"--data.name {missing} has nothing left to train on", "Leave it out, or mend it.")
    return counts.tolist()  # type: ignore[no-any-return]


def mixed(train: Dataset, counts: Sequence[int], config: SourcesConfig) -> tuple[Dataset | Mixture, list[float]]:
    """The rows of an epoch by `config.weights`, and how often each source is gone through in it.

    Args:
        train: rows of all sources, one source after the other.
        counts: rows of each.
        config: without weights all rows are taken once.
    """
    if not config.weights:
        return train, [1.0] * len(counts)
    rows, passes = _mix(counts, config.weights, config.split_seed)
    return Mixture(train, rows), passes


def _mix(counts: Sequence[int], weights: Sequence[float], seed: int) -> tuple[npt.NDArray[np.int64], list[float]]:
    """The sequences of an epoch, and how often each source is gone through in it.

    The source that has most for its weight is seen once, the others as often as their weights ask for: in whole
    passes, and one over a random part.
    """
    shares = np.array(weights) / sum(weights)
    total = max(count / share for count, share in zip(counts, shares, strict=True))
    generator = np.random.default_rng(seed)
    rows, start = [], 0
    for count, share in zip(counts, shares, strict=True):
        wanted = max(round(total * share), count)
        whole, rest = divmod(wanted, count)
        rows.append(start + np.tile(np.arange(count), whole))
        rows.append(start + np.sort(generator.permutation(count)[:rest]))
        start += count
    return np.concatenate(rows), [round(total * share) / count for count, share in zip(counts, shares, strict=True)]
