"""Splits by class, in an order that follows from the texts and a seed alone.

The order does not depend on the files, their order, the machine or the version of a library: the same texts are
split alike wherever they come from, and a smaller limit takes a part of what a larger one takes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from toolkit.data.clean import (
    DROPPED,
    TEST,
    TRAIN,
    VALIDATION,
    Cleaned,
    Codes,
    Keys,
    Roles,
    Rows,
    drop_leaks,
    group_texts,
    hashed,
)
from toolkit.data.files import ROLES
from toolkit.errors import ConfigError, DataError

Order = npt.NDArray[np.uint64]


class HeldOut(Protocol):
    """What is held out where no split is given: the settings that all sections of data have in common."""

    @property
    def validation_share(self) -> float:
        """Share held out for validation."""

    @property
    def test_share(self) -> float:
        """Share held out for the test."""

    @property
    def folds(self) -> int | None:
        """Of so many folds one is the test."""

    @property
    def fold(self) -> int:
        """Which one."""

    @property
    def split_seed(self) -> int:
        """Of the order."""


class Shares(HeldOut, Protocol):
    """What is asked of the splits of labelled data."""

    @property
    def train_samples(self) -> int | None:
        """At most so many."""

    @property
    def validation_samples(self) -> int | None:
        """At most so many."""

    @property
    def test_samples(self) -> int | None:
        """At most so many."""

    @property
    def deduplicate(self) -> bool:
        """Whether repeats were dropped."""


@dataclass(frozen=True)
class Split:
    """Which rows are in which split.

    Attributes:
        roles: the split of each row, or `DROPPED`.
        repeats: rows that were dropped after the split, as their text is also in a split that is tested on.
        warnings: for the user.
    """

    roles: Roles
    repeats: int
    warnings: tuple[str, ...]


def split(config: Shares, cleaned: Cleaned, given: Container[str], units: Keys | None = None) -> Split:
    """Take the splits that are not given from the training data, then limit all of them.

    Args:
        config: shares, limits and the seed.
        cleaned: the rows.
        given: names of the splits that the source has.
        units: 128 bits for each row, in two words: rows with the same ones are not parted. Otherwise each class has
            its share in each split.

    Raises:
        ConfigError: the shares leave nothing, or fewer training rows are wanted than there are classes.
        DataError: a class has too few rows to be in every split, or a split has no rows left.
    """
    check_shares(config, given)
    roles, codes, order = cleaned.roles, cleaned.codes, shuffle_key(cleaned.keys, config.split_seed)
    taken = {role for role in (VALIDATION, TEST) if ROLES[role] not in given}
    repeats = parted = 0
    if units is not None:
        roles, parted = hold_out_groups(config, roles, units, taken)
        _check_trained(roles, codes, cleaned.labels, "stand in groups")
    else:
        roles = hold_out(config, roles, codes, order, taken, cleaned.labels)
    if not config.deduplicate:
        # Repeats may be trained on, but not tested on.
        roles, lost = drop_leaks(roles, cleaned.groups)
        repeats = sum(lost.values())
        _check_trained(roles, codes, cleaned.labels, "have texts")
    for role, most in (
        (TRAIN, config.train_samples),
        (VALIDATION, config.validation_samples),
        (TEST, config.test_samples),
    ):
        roles = limit(roles, role, most, codes, order)
        if not np.any(roles == role):
            raise DataError(
                f"the {ROLES[role]} split has no rows left after cleaning",
                "All of them are also in another split: give other data, or leave this split out.",
            )
    warnings = absent_classes(roles, codes, cleaned.labels)
    if parted:
        warnings.insert(0, f"{parted} rows were dropped because rows of their group are in a split that is tested on")
    if repeats:
        warnings.insert(0, f"{repeats} rows were dropped because their text is also in a split that is tested on")
    return Split(roles, repeats, tuple(warnings))


def keys_of_groups(groups: pa.ChunkedArray, keys: Keys) -> Keys:
    """128 bits for the group of each row, in two words; a row without one is a group of its own.

    Args:
        groups: strings or nulls.
        keys: of the rows.
    """
    coded = pa.concat_arrays(groups.dictionary_encode().unify_dictionaries().chunks)
    words = np.concatenate([hashed(name.strip() for name in coded.dictionary.to_pylist()), np.zeros((1, 2), np.uint64)])
    known = pc.fill_null(coded.indices, len(words) - 1).to_numpy(zero_copy_only=False)
    return np.where((known == len(words) - 1)[:, None], keys, words[known])


def hold_out_groups(config: HeldOut, roles: Roles, units: Keys, taken: Container[int]) -> tuple[Roles, int]:
    """Take the splits in `taken` from the training data, whole groups at a time.

    Args:
        config: shares, folds and seed.
        roles: splits that were given, or `DROPPED`.
        units: from `keys_of_groups`.
        taken: the splits that were not given.

    Returns:
        The split of each row, and how many were dropped because their group is in a split that is held out.

    Raises:
        DataError: there are fewer groups than splits or folds.
    """
    there = len(np.unique(group_texts(units)[roles == TRAIN]))
    held_out = len([role for role in (VALIDATION, TEST) if role in taken])
    needed = max(1 + held_out, config.folds or 0)
    if there < needed:
        raise DataError(
            f"--data.group has {there} groups in the training data, where {needed} splits or folds take {needed}",
            "Name another column, or give the splits yourself with --data.validation and --data.test.",
        )
    return part_rows(config, roles, units, None)


def _check_trained(roles: Roles, codes: Codes, names: Sequence[str], why: str) -> None:
    untrained = np.setdiff1d(codes[roles != DROPPED], codes[roles == TRAIN])
    if len(untrained):
        raise DataError(
            f"all training rows of class {', '.join(repr(names[code]) for code in untrained[:5])} {why} that are "
            "also in validation or test",
            "Add rows of that class, or let repeats be dropped first (--data.deduplicate), or try another "
            "--data.split_seed.",
        )


def check_shares(config: HeldOut, given: Container[str]) -> None:
    """Raises ConfigError where the shares that are to be taken leave nothing to train on."""
    check_folds(config, given_test="test" in given)
    taken = {name: getattr(config, f"{name}_share") for name in ROLES[1:] if name not in given}
    if config.folds:
        taken.pop("test")
    if sum(taken.values()) >= 1:
        listed = " and ".join(f"--data.{name}_share {share:g}" for name, share in taken.items())
        raise ConfigError(f"{listed} leave nothing to train on", "Make them smaller: together less than 1.")


def check_folds(config: HeldOut, *, given_test: bool) -> None:
    """Raises ConfigError where there is no such fold, or folds cannot take effect."""
    if config.folds is None:
        if config.fold:
            raise ConfigError(f"--data.fold {config.fold} has no effect without --data.folds", "Give both.")
        return
    if given_test:
        raise ConfigError(
            f"--data.folds {config.folds} has no effect beside a test split that is given", "Leave one of them out."
        )
    if config.fold >= config.folds:
        raise ConfigError(
            f"--data.fold {config.fold} is none of {config.folds} folds", f"They are 0 to {config.folds - 1}."
        )


def hold_out(
    config: HeldOut,
    roles: Roles,
    codes: Codes,
    order: Order,
    taken: Container[int],
    names: Sequence[str],
) -> Roles:
    """Take the splits in `taken` from the training data: the test as a fold or a share, then shares for the others.

    Raises:
        DataError: a class has too few rows to be in every split, or in every fold.
    """
    shares = {VALIDATION: config.validation_share, TEST: config.test_share}
    wanted = {role: share for role, share in shares.items() if role in taken}
    if config.folds:
        roles = _take_fold(roles, codes, order, config.folds, config.fold, names)
        wanted.pop(TEST)
    return take_shares(roles, codes, order, wanted, names)


def _take_fold(roles: Roles, codes: Codes, order: Order, folds: int, fold: int, names: Sequence[str]) -> Roles:
    """Move every class's rows of one fold to the test: each row is in the test of exactly one fold."""
    pool = np.flatnonzero(roles == TRAIN)
    classes, code = np.unique(codes[pool], return_inverse=True)
    counts = np.bincount(code)
    _check_rare(counts, [names[index] for index in classes], folds, "folds")
    # Classes go on where the one before ended, so that the folds are of the same size.
    begins = (np.cumsum(counts) - counts)[code]
    result = roles.copy()
    result[pool[(_place_in_class(code, order[pool], counts) + begins) % folds == fold]] = TEST
    return result


def part_rows(config: HeldOut, roles: Roles, keys: Keys, classes: Rows | None) -> tuple[Roles, int]:
    """The split of each row, and how many were dropped because they stand in a held-out split too.

    The order does not depend on files or machines, as in `toolkit.data.split`.

    Args:
        config: shares, folds and seed.
        roles: splits that were given, or `DROPPED`; the training rows are parted where others are wanted.
        keys: 128 bits for each row, in two words; rows with the same ones are not parted.
        classes: index of the class of each row, where their shares are to stay; alike in rows that are not parted.
    """
    units, first, unit_of = _units(keys)
    given = set(np.unique(roles).tolist())  # before the leaks go
    order = shuffle_key(keys[first], config.split_seed)
    held = np.full(len(units), TRAIN, roles.dtype)
    np.maximum.at(held, unit_of, roles)  # of the roles, the later one is held out from the earlier
    leaks = (roles != DROPPED) & (roles != held[unit_of])
    roles = np.where(leaks, DROPPED, roles).astype(roles.dtype)
    pool = np.bincount(unit_of, roles == TRAIN, len(units)).astype(np.int64)  # rows of each unit
    strata = np.zeros(len(units), np.int64) if classes is None else classes[first]
    validation = 0.0 if VALIDATION in given else config.validation_share
    place = _places(strata, order, pool)
    of_unit = np.full(len(units), TRAIN, roles.dtype)
    if config.folds is not None:
        of_unit[np.floor(place * config.folds).astype(int) == config.fold] = TEST
        rest = np.where(of_unit == TRAIN, pool, 0)
        again = shuffle_key(keys[first], config.split_seed + 1)  # else the validation would border on the test
        of_unit[(of_unit == TRAIN) & (_places(strata, again, rest) < validation)] = VALIDATION
    else:
        test = 0.0 if TEST in given else config.test_share
        of_unit[place < test + validation] = VALIDATION
        of_unit[place < test] = TEST
    roles = np.where(roles == TRAIN, of_unit[unit_of], roles).astype(roles.dtype)
    return roles, int(leaks.sum())


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


def shuffle_key(keys: Keys, seed: int) -> Order:
    """A pseudo-random number for each text, by which rows are sorted.

    The finaliser of SplitMix64 (Steele, Lea and Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014)
    over the hash of the text, moved on by the seed.
    """
    with np.errstate(over="ignore"):
        step = np.array([(seed + 1) % 2**64], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = keys[:, 0] + step
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: Order = state ^ (state >> np.uint64(31))
    return result


def apportion(total: int, counts: Rows, most: Rows) -> Rows:
    """Share out `total` seats in proportion to `counts`, by the largest remainder.

    Every class gets at least one where there are enough, and none more than `most`. The sum is `total` unless
    these bounds make that impossible.
    """
    fewest = np.minimum(1 if total >= len(counts) else 0, most)
    total = int(min(max(total, fewest.sum()), most.sum()))
    ideal = counts * total
    seats: Rows = np.clip(ideal // counts.sum(), fewest, most)
    while missing := total - int(seats.sum()):
        change = 1 if missing > 0 else -1
        free = np.flatnonzero(seats < most if change > 0 else seats > fewest)
        # How far a class is below its ideal share; ties go to the class that comes first.
        short = (ideal - seats * counts.sum())[free] * change
        chosen = free[np.argsort(-short, kind="stable")][: abs(missing)]
        seats[chosen] += change
    return seats


def take_shares(roles: Roles, codes: Codes, order: Order, shares: Mapping[int, float], names: Sequence[str]) -> Roles:
    """Move shares of every class from the training data to the splits that are not given.

    Args:
        roles: of all rows.
        codes: class of each row.
        order: from `shuffle_key`.
        shares: share of the training data for `TEST` and `VALIDATION`, if they are to be taken.
        names: of the classes.

    Raises:
        DataError: a class has too few rows to be in every split.
    """
    if not shares:
        return roles
    pool = np.flatnonzero(roles == TRAIN)
    classes, code = np.unique(codes[pool], return_inverse=True)
    counts = np.bincount(code)
    _check_rare(counts, [names[index] for index in classes], 1 + len(shares))
    place = _place_in_class(code, order[pool], counts)
    result, taken = roles.copy(), np.zeros_like(counts)
    for later, role in reversed(list(enumerate(sorted(shares)))):
        # Leave a row for training and for each split that is still to come.
        seats = apportion(round(shares[role] * len(pool)), counts, counts - taken - later - 1)
        result[pool[(place >= taken[code]) & (place < (taken + seats)[code])]] = role
        taken = taken + seats
    return result


def limit(roles: Roles, role: int, most: int | None, codes: Codes, order: Order) -> Roles:
    """Keep at most `most` rows of one split, in the proportions of its classes.

    Raises:
        ConfigError: fewer training rows than classes.
    """
    rows = np.flatnonzero(roles == role)
    if most is None or len(rows) <= most:
        return roles
    _, code = np.unique(codes[rows], return_inverse=True)
    counts = np.bincount(code)
    if role == TRAIN and most < len(counts):
        raise ConfigError(
            f"--data.train_samples {most} is fewer than the {len(counts)} classes",
            f"Use at least {len(counts)}.",
        )
    seats = apportion(most, counts, counts)
    result = roles.copy()
    result[rows[_place_in_class(code, order[rows], counts) >= seats[code]]] = DROPPED
    return result


def _place_in_class(code: Rows, order: Order, counts: Rows) -> Rows:
    """The place of each row within its class, in the order of the shuffle (equal texts in that of the rows)."""
    by_class = np.lexsort((order, code))
    place = np.empty(len(code), np.int64)
    place[by_class] = np.arange(len(code)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def _check_rare(counts: Rows, names: list[str], needed: int, of: str = "splits") -> None:
    rare = [f"'{names[index]}' ({counts[index]})" for index in np.flatnonzero(counts < needed)]
    if rare:
        raise DataError(
            f"too few rows to be in each of {needed} {of}, after cleaning: {', '.join(rare[:5])}"
            f"{' …' if len(rare) > 5 else ''}",
            f"Remove or merge these classes, or add rows until each has {needed}; or give the splits yourself with "
            "--data.validation and --data.test.",
        )


def absent_classes(roles: Roles, codes: Codes, names: Sequence[str]) -> list[str]:
    """A warning for each of validation and test that lacks classes of the training data."""
    trained = np.unique(codes[roles == TRAIN])
    warnings = []
    for role in (VALIDATION, TEST):
        lacking = trained[~np.isin(trained, codes[roles == role])]
        if len(lacking):
            listed = ", ".join(f"'{names[code]}'" for code in lacking[:5])
            warnings.append(f"the {ROLES[role]} split has no row of class {listed}{' …' if len(lacking) > 5 else ''}")
    return warnings
