"""One pass over all texts with `datasets`: quietly, in as many processes as it is worth, into a folder of ours."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils
from datasets import Dataset, Features, Value

from toolkit.config import Normalisation
from toolkit.environment import cores_of_this_process, is_main_rank
from toolkit.normalise import normalise

_BARS: tuple[Any, ...] = (datasets, huggingface_hub.utils)

ROWS_FOR_A_PROCESS = 1_000
"""Fewer rows than these are done sooner than another process starts."""
ROWS_FOR_A_BAR = 20_000
"""With fewer rows a progress bar only flickers."""


def process_count(rows: int, wish: int | None) -> int:
    """How many processes to use: `wish`, or one for each core, at most 8 and no more than the rows are worth."""
    if wish is not None:
        return max(1, min(wish, rows))
    return max(1, min(cores_of_this_process(), 8, rows // ROWS_FOR_A_PROCESS))


@contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """Silence the log of `datasets` and of the hub's client; show progress bars only if `bars`, on the main rank.

    What was set before is set again afterwards.
    """
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    show = bars and is_main_rank()
    hidden = [] if show else [library for library in _BARS if not library.are_progress_bars_disabled()]
    for logger in loggers:
        # Above CRITICAL: `datasets` logs as an error what it then raises, and we tell it in our own words.
        logger.setLevel(logging.CRITICAL + 1)
    for library in hidden:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in hidden:
            library.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keep the threads of `tokenizers` out of it: the processes are the parallelism.

    Once those threads have run, every later fork (of a data loader's worker, say) prints a warning.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def map_texts(
    texts: Dataset,
    function: Callable[[list[str | None]], dict[str, Any]],
    features: Features,
    *,
    processes: int | None,
    scratch: Path,
    title: str,
    rows_at_once: int = 1000,
) -> Dataset:
    """Apply `function` to batches of the column `text`; the result has the columns that it returns, and no text.

    Args:
        texts: with one column, `text`.
        function: must be picklable; gets the texts of a batch.
        features: the columns that it returns.
        processes: wish of the user, or None.
        scratch: folder for the result; `title` must be new in it.
        title: shown beside the progress bar.
        rows_at_once: whose results are in memory together.
    """
    count = process_count(len(texts), processes)
    with quiet(bars=len(texts) >= ROWS_FOR_A_BAR), _serial_tokenizers():
        return texts.map(
            function,
            batched=True,
            batch_size=rows_at_once,
            writer_batch_size=rows_at_once,
            input_columns=["text"],
            remove_columns=["text"],
            features=features,
            num_proc=count if count > 1 else None,
            # The library's own fingerprint would pickle the function; ours already names the whole result.
            new_fingerprint=title.replace(" ", "-"),
            cache_file_name=str(scratch / f"{title.replace(' ', '-')}.arrow"),
            load_from_cache_file=False,
            desc=title,
        )


def normalised_texts(
    texts: Dataset, steps: Sequence[Normalisation], *, processes: int | None, scratch: Path, title: str = "Normalising"
) -> Dataset:
    """The same for a column `text` of texts and nulls; `title` must be new in `scratch`, a folder for the result."""
    if not steps:
        return texts
    return map_texts(
        texts,
        functools.partial(_normalise_some, steps=tuple(steps)),
        Features({"text": Value("string")}),
        processes=processes,
        scratch=scratch,
        title=title,
    )


def _normalise_some(texts: list[str | None], *, steps: Sequence[Normalisation]) -> dict[str, Any]:
    return {"text": [None if text is None else normalise(text, steps) for text in texts]}
