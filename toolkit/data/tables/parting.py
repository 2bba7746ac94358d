"""Which rows of a table are trained on, validated and tested on; equal rows, or those of a group, are never parted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]

from toolkit.config import TableConfig
from toolkit.data.clean import DROPPED, TEST, TRAIN, VALIDATION, Roles, Rows, group_texts
from toolkit.data.files import Role
from toolkit.data.split import check_shares, shuffle_key
from toolkit.errors import ConfigError

Keys = npt.NDArray[np.uint64]


def check_parting(config: TableConfig, given: Collection[Role]) -> None:
    """Raises ConfigError where settings of the split contradict each other or have no effect."""
    if config.group is not None and config.split == "stratified":
        raise ConfigError(
            "--data.split stratified has no effect beside --data.group, whose groups stay whole", "Give one of the two."
        )
    if config.group == config.target:
        raise ConfigError(f"--data.group {config.group} is the target too", "Name another column.")
    check_shares(config, given)


def keys_of(cells: pa.Table, group: str | None) -> Keys:
    """128 bits for each row, over all of it or over its group, whatever the order of the columns."""
    names = [group] if group else sorted(cells.column_names)
    columns = [cells.column(name).to_pylist() for name in names]
    digests = b"".join(
        hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for row in zip(*columns, strict=True)
    )
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


def part_rows(config: TableConfig, roles: Roles, keys: Keys, classes: Rows | None) -> tuple[Roles, int]:
    """The split of each row, and how many were dropped because they stand in a held-out split too.

    The order does not depend on files or machines, as in `toolkit.data.split`.

    Args:
        config: shares, folds, seed and limit.
        roles: splits that were given, or `DROPPED`; the training rows are parted where others are wanted.
        keys: from `keys_of`; rows with the same one are not parted.
        classes: index of the class of each row, where their shares are to stay.
    """
    units, first, unit_of = _units(keys)
    order = shuffle_key(keys[first], config.split_seed)
    held = np.full(len(units), TRAIN, roles.dtype)
    np.maximum.at(held, unit_of, roles)  # of the roles, the later one is held out from the earlier
    leaks = (roles != DROPPED) & (roles != held[unit_of])
    roles = np.where(leaks, DROPPED, roles).astype(roles.dtype)
    pool = np.bincount(unit_of, roles == TRAIN, len(units)).astype(np.int64)  # rows of each unit
    strata = np.zeros(len(units), np.int64) if classes is None or config.group else classes[first]
    validation = 0.0 if VALIDATION in roles else config.validation_share
    place = _places(strata, order, pool)
    of_unit = np.full(len(units), TRAIN, roles.dtype)
    if config.folds is not None:
        of_unit[np.floor(place * config.folds).astype(int) == config.fold] = TEST
        rest = np.where(of_unit == TRAIN, pool, 0)
        again = shuffle_key(keys[first], config.split_seed + 1)  # else the validation would border on the test
        of_unit[(of_unit == TRAIN) & (_places(strata, again, rest) < validation)] = VALIDATION
    else:
        test = 0.0 if TEST in roles else config.test_share
        of_unit[place < test + validation] = VALIDATION
        of_unit[place < test] = TEST
    roles = np.where(roles == TRAIN, of_unit[unit_of], roles).astype(roles.dtype)
    return _limited(roles, order[unit_of], config.train_rows), int(leaks.sum())


def _units(keys: Keys) -> tuple[Rows, Rows, Rows]:
    """The different keys, the first row of each, and the unit of each row."""
    units, first, unit_of = np.unique(group_texts(keys), return_index=True, return_inverse=True)
    return units, first, unit_of


def _places(strata: Rows, order: npt.NDArray[np.uint64], sizes: Rows) -> npt.NDArray[np.float64]:
    """Where the middle of each unit lies among the rows of its stratum, from 0 to 1, in the given order."""
    sorted_units = np.lexsort((order, strata))
    sizes, strata = sizes[sorted_units], strata[sorted_units]
    ends = np.cumsum(sizes)
    starts = np.flatnonzero(np.concatenate([[True], strata[1:] != strata[:-1]]))
    before = np.concatenate([[0], ends])[starts]
    totals = np.add.reduceat(sizes, starts)
    of = np.cumsum(np.isin(np.arange(len(strata)), starts)) - 1
    places = np.empty(len(strata))
    places[sorted_units] = (ends - sizes / 2 - before[of]) / np.maximum(totals[of], 1)
    return places.clip(0, 1 - 1e-12)


def _limited(roles: Roles, order: npt.NDArray[np.uint64], most: int | None) -> Roles:
    """At most so many training rows; those that a smaller limit takes are among them."""
    rows = np.flatnonzero(roles == TRAIN)
    if most is None or len(rows) <= most:
        return roles
    result = roles.copy()
    result[rows[np.argsort(order[rows], kind="stable")[most:]]] = DROPPED
    return result
