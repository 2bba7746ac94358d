"""Texts that belong together, in pairs: from rows to tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from datasets import Features, Value
from datasets import List as ListOf

from toolkit.config import AnchorsConfig
from toolkit.data.examples import Examples, examples
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import check_tokenizer, encode, tokenizer_fingerprint

_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "pieces": ListOf(Value("int32")),
        "keys": ListOf(Value("int64")),
        "length": Value("int32"),
        "cut": Value("bool"),
    }
)
_WHAT = ("pairs of texts", "say what makes a pair with --data.pair and its columns")
_END_OF_SENTENCE = re.compile(r"[。！？!?…]+[”’」』）)\"']*\s*|\.[”’)\"']*\s+|\n+")
Pair = dict[str, str]
"""`anchor`, `positive`, and maybe `negative`."""


def anchored_texts(config: AnchorsConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `encoded_anchors`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no pairs.
    """
    columns = (config.anchor, config.positive, config.negative) if config.pair == "columns" else (config.text,)
    canonical = functools.partial(_canonical, kind=config.pair, columns=columns)
    settings = {"kind": "text pairs", "revision": _REVISION, "pair": config.pair, "columns": columns}
    return gather_rows(config, canonical, _WHAT, settings, _said)


def encoded_anchors(config: AnchorsConfig, corpus: TextCorpus, tokenizer: Any) -> Examples:
    """Tokenise every text of every pair; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks, as `anchored_texts`.

    Returns:
        Columns: `input_ids` (of the texts of a pair end to end: anchor, positive and maybe negative, each with its
        special tokens), `pieces` (tokens of each), `keys` (int64, by which equal texts are known), `length` (of all
        together), `cut` (one was longer than `max_length`).

    Raises:
        ConfigError: the special tokens alone fill a text; weights that are not one for each source.
        DataError: too many rows are unfit, or a split has none left.
    """
    warnings = check_tokenizer(tokenizer, config.max_length)
    encode_one = functools.partial(_encode, tokenizer=tokenizer, max_length=config.max_length)
    settings = ["text pairs", _REVISION, tokenizer_fingerprint(tokenizer), config.max_length]
    data = examples(config, corpus, encode_one, _FEATURES, settings)
    data.facts["warnings"] = warnings + data.facts["warnings"]
    return data


def _canonical(row: Mapping[str, Any], kind: str, columns: tuple[str, ...]) -> str:
    if kind == "columns":
        pair = dict(zip(("anchor", "positive"), (_text(row, column) for column in columns[:2]), strict=True))
        if row.get(columns[2]) not in (None, ""):
            pair["negative"] = _text(row, columns[2])
    else:
        make = _headline if kind == "headline" else _halves
        pair = make(_text(row, columns[0]))
    said = [" ".join(text.split()) for text in pair.values()]
    if len(set(said)) < len(said):
        raise Unfit("two of their texts are the same")
    return write(pair)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise Unfit(f"their column '{column}' is missing, empty or no text")
    return value.strip()


def _headline(text: str) -> Pair:
    first, _, rest = text.partition("\n")
    if not rest.strip():
        raise Unfit("they have one line, which leaves nothing behind a headline")
    return {"anchor": first.strip(), "positive": rest.strip()}


def _halves(text: str) -> Pair:
    ends = [found.end() for found in _END_OF_SENTENCE.finditer(text) if found.end() < len(text)]
    if not ends:
        raise Unfit("they have one sentence, which makes no two halves")
    middle = min(ends, key=lambda end: abs(2 * end - len(text)))
    return {"anchor": text[:middle].strip(), "positive": text[middle:].strip()}


def _said(text: str) -> str:
    return "\n\n".join(json.loads(text).values())


def _encode(pair: Pair, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    texts = list(pair.values())
    whole = [len(ids) for ids in encode(texts, tokenizer, 10**9)["input_ids"]]
    rows: list[list[int]] = encode(texts, tokenizer, max_length)["input_ids"]
    if not all(rows):
        raise Unfit("the tokenizer finds no token in one of their texts")
    tokens = [token for ids in rows for token in ids]
    pieces = [len(ids) for ids in rows]
    keys = [_key(text) for text in texts]
    return [
        {"input_ids": tokens, "pieces": pieces, "keys": keys, "length": len(tokens), "cut": pieces != whole},
    ]


def _key(text: str) -> int:
    """63 bits of what a text says."""
    digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
