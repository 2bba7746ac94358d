"""Which rows of a table are trained on, validated and tested on."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from toolkit.config import TableConfig
from toolkit.data.clean import DROPPED, TRAIN, Keys, Roles, Rows, hashed
from toolkit.data.files import Role
from toolkit.data.split import Order, check_shares, part_rows, shuffle_key
from toolkit.errors import ConfigError


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
    return hashed(map(repr, zip(*columns, strict=True)))


def part_table(config: TableConfig, roles: Roles, cells: pa.Table, classes: Rows | None) -> tuple[Roles, int]:
    """The split of each row, and how many were dropped because they stand in a held-out split too.

    Args:
        config: shares, folds, seed, group and limit.
        roles: splits that were given, or `DROPPED`; the training rows are parted where others are wanted.
        cells: all rows; equal ones, or those of one group, are not parted.
        classes: index of the class of each row, where their shares are to stay.
    """
    keys = keys_of(cells, config.group)
    roles, leaks = part_rows(config, roles, keys, None if config.group else classes)
    return _limited(roles, shuffle_key(keys, config.split_seed), config.train_rows), leaks


def _limited(roles: Roles, order: Order, most: int | None) -> Roles:
    """At most so many training rows; those that a smaller limit takes are among them."""
    rows = np.flatnonzero(roles == TRAIN)
    if most is None or len(rows) <= most:
        return roles
    result = roles.copy()
    result[rows[np.argsort(order[rows], kind="stable")[most:]]] = DROPPED
    return result
