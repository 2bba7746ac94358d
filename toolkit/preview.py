"""Samples as a model will see them: which of their tokens are learnt, given, or padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from toolkit.report import Shown
from toolkit.tasks import Batch, Task


def preview(task: Task, batches: Iterable[Batch], tokenizer: Any, samples: int) -> list[Shown]:
    """The rows of the first samples of some batches.

    Args:
        task: says what is learnt.
        batches: as its `collate` makes them, with `input_ids` and `attention_mask`.
        tokenizer: of the ids.
        samples: so many, with both answers of a pair, and with about as many packed texts as there are in them.
    """
    shown: list[Shown] = []
    for batch in batches:
        if not batch.ids or samples <= 0:
            continue
        ids, mask, learnt = (tensor.tolist() for tensor in task.shown(batch))
        # Rows of a sample stand together: two of a pair, any number of texts that are packed into one.
        rows = min(len(ids), math.ceil(samples * len(ids) / len(batch.ids)))
        for row in range(rows):
            pairs = zip(mask[row], learnt[row], strict=True)
            kinds = ["padding" if not there else "learnt" if mark else "given" for there, mark in pairs]
            parts = [(kind, tokenizer.decode(tokens), len(tokens)) for kind, tokens in _runs(kinds, ids[row])]
            shown.append(Shown(task.title(batch, row), parts))
        samples -= len(batch.ids)
    return shown


def _runs(kinds: Sequence[str], ids: Sequence[int]) -> Iterable[tuple[str, list[int]]]:
    """Neighbours of one kind together."""
    for kind, tokens in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        yield kind, [token for _, token in tokens]
