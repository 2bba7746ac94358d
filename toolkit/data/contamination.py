"""Passages of held-out texts in training texts, which would make the test measure memory."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf

from toolkit.data.clean import DROPPED, TEST, TRAIN, VALIDATION, Roles
from toolkit.data.contents import Contents, Grams, grams


def drop_contaminated(contents: Contents, kept: Roles, length: int | None) -> tuple[Roles, dict[str, int]]:
    """Drop training texts that share a run of so many words with a validation or test text.

    As in appendix C of Brown et al. 2020 (Language Models are Few-Shot Learners), but whole texts, and however often
    a run occurs: what is left shares none.

    Args:
        contents: of all rows.
        kept: split of each row, or `DROPPED`.
        length: of a run, in words as `grams` counts them; None drops nothing.

    Returns:
        The new roles, and how many rows were dropped for which reason.
    """
    if length is None:
        return kept, {}
    held_out, trained = np.flatnonzero(np.isin(kept, (VALIDATION, TEST))), np.flatnonzero(kept == TRAIN)
    list_runs = functools.partial(_list_runs, length=length)
    table = contents.measure(held_out, list_runs, Features({"runs": ListOf(Value("uint64"))}), "Reading held-out texts")
    runs = [chunk.flatten().to_numpy() for chunk in table.with_format("arrow")[:].column("runs").chunks]
    path = contents.scratch / "held-out runs.npy"
    np.save(path, np.unique(np.concatenate([np.empty(0, np.uint64), *runs])))
    shares_one = functools.partial(_shares_one, length=length, path=path)
    table = contents.measure(trained, shares_one, Features({"shared": Value("bool")}), "Looking for held-out passages")
    shared = table.with_format("arrow")[:].column("shared").to_numpy()
    result = kept.copy()
    result[trained[shared]] = DROPPED
    return result, {f"sharing {length} words with a held-out split": int(shared.sum())}


def _list_runs(texts: list[str], *, length: int) -> dict[str, list[Grams]]:
    return {"runs": [grams(text, length) for text in texts]}


def _shares_one(texts: list[str], *, length: int, path: Path) -> dict[str, list[bool]]:
    # On the disk, so that all processes share it.
    held_out = np.load(path, mmap_mode="r")
    if not len(held_out):
        return {"shared": [False] * len(texts)}
    shared = []
    for text in texts:
        mine = grams(text, length)
        places = np.minimum(np.searchsorted(held_out, mine), len(held_out) - 1)
        shared.append(bool(np.any(held_out[places] == mine)))
    return {"shared": shared}
