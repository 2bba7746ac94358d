"""Texts to token ids, cut to a length, without padding; and what that does to them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from collections.abc import Sequence as Several
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Sequence, Value

from toolkit.data.mapping import map_texts
from toolkit.errors import ConfigError

EDGES = [0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192]
"""Of the histogram of lengths, in tokens; the last bin goes up to the longest text."""


_OPTIONS = {
    "add_special_tokens": True,
    "padding": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


def check_tokenizer(tokenizer: Any, max_length: int) -> list[str]:
    """Warnings about a tokenizer and a length.

    Raises:
        ConfigError: the special tokens alone fill a sample.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if special >= max_length:
        raise ConfigError(
            f"--data.max_length {max_length} leaves no room beside the {special} special tokens of a sample",
            f"Use at least {special + 1}.",
        )
    longest = getattr(tokenizer, "model_max_length", None)
    if longest and max_length > longest:
        return [
            f"--data.max_length {max_length} is beyond the {longest} tokens that the tokenizer's model was made for"
        ]
    return []


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over what the tokenizer does: the same on every machine, and whatever it was called with before."""
    side = [tokenizer.truncation_side, bool(getattr(tokenizer, "split_special_tokens", False))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two are left over from the last call.
        state["truncation"] = state["padding"] = None
        content = json.dumps(state).encode()
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            content = b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    return hashlib.sha256(json.dumps(side).encode() + content).hexdigest()


def encode(texts: Iterable[str | None], tokenizer: Any, max_length: int) -> Any:
    """Texts to token ids, special tokens included, cut to `max_length`, without padding.

    The only place where a text is cut, for training as for predictions.

    Returns:
        A `transformers.BatchEncoding`; its `input_ids` are a list of int for each text.
    """
    return tokenizer(list(texts), truncation=True, max_length=max_length, **_OPTIONS)


def encode_pairs(pairs: Several[Several[str]], tokenizer: Any, max_length: int) -> Any:
    """The same for pairs of texts, of which the longer one loses its end first.

    Returns:
        `input_ids`, and `token_type_ids` where the tokenizer's models read them: which of the two a token is of.
    """
    first, second = ([str(pair[place]) for pair in pairs] for place in (0, 1))
    return tokenizer(
        first,
        second,
        truncation="longest_first",
        max_length=max_length,
        **_OPTIONS | {"return_token_type_ids": "token_type_ids" in tokenizer.model_input_names},
    )


def tokenize(
    texts: Dataset, tokenizer: Any, max_length: int, *, processes: int | None, scratch: Path, title: str
) -> Dataset:
    """Cut texts into tokens, special tokens included.

    Returns:
        Columns: `input_ids` (list of int, `max_length` at most), `length` (of `input_ids`), `whole` (length before the
        cut), `unknown` (unknown tokens in `input_ids`).
    """
    features = Features(
        {
            "input_ids": Sequence(Value("int32")),
            "length": Value("int32"),
            "whole": Value("int32"),
            "unknown": Value("int32"),
        }
    )
    function = partial(_tokens, tokenizer=tokenizer, max_length=max_length)
    return map_texts(texts, function, features, processes=processes, scratch=scratch, title=title)


def _tokens(texts: list[str | None], *, tokenizer: Any, max_length: int) -> dict[str, Any]:
    batch = encode(texts, tokenizer, max_length)
    ids: list[list[int]] = batch["input_ids"]
    if batch.encodings is not None:
        special = tokenizer.num_special_tokens_to_add(pair=False)
        whole = [len(one) + sum(len(rest) - special for rest in one.overflowing) for one in batch.encodings]
    else:
        uncut = tokenizer(texts, truncation=False, **_OPTIONS)
        whole = [len(row) for row in uncut["input_ids"]]
    unknown = _unknown_id(tokenizer)
    return {
        "input_ids": ids,
        "length": [len(row) for row in ids],
        "whole": whole,
        "unknown": [row.count(unknown) if unknown is not None else 0 for row in ids],
    }


def _unknown_id(tokenizer: Any) -> int | None:
    """None too where the unknown token doubles as the end or the beginning, as in GPT-2: those are no unknown words."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def length_histogram(lengths: npt.NDArray[np.int64]) -> list[int]:
    """How many lengths lie in each bin of `EDGES` (lower edge included); the last bin is open."""
    counts, _ = np.histogram(lengths, bins=[*EDGES, np.inf])
    return [int(count) for count in counts]
