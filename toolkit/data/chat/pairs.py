"""Pairs of answers to one question, of which one is preferred: from rows to tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from toolkit.config import PairsConfig
from toolkit.data.chat.encode import Encoded, encode
from toolkit.data.chat.messages import Message, messages_of
from toolkit.data.chat.prepare import TOO_LONG, row_of, sequences
from toolkit.data.chat.rows import words_of
from toolkit.data.language import LanguageData
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.text_corpus import TextCorpus

_WHAT = ("pairs of answers", "give their columns the names prompt, chosen and rejected")


def answer_pairs(config: PairsConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `preferences`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no pairs.
    """
    return gather_rows(config, _canonical, _WHAT, {"kind": "pairs"}, _said)


def preferences(config: PairsConfig, corpus: TextCorpus, tokenizer: Any) -> LanguageData:
    """Write every pair with the template and tokenise it; the second call with the same content loads it.

    To be called before the process group exists, on all ranks, as `answer_pairs`.

    Returns:
        As `chat`, of which a row has two pieces: the question with the preferred answer, and with the other.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many pairs are unfit, or a split has none left.
    """
    encode_one = functools.partial(_encode_pair, room=config.max_length, too_long=config.too_long)
    return sequences(config, corpus, tokenizer, encode_one, ["pairs", config.max_length, config.too_long])


def _canonical(row: Mapping[str, Any]) -> str:
    chosen, rejected = (_conversation(row, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unfit("their two conversations differ before the last answer")
    if chosen[-1] == rejected[-1]:
        raise Unfit("both answers are the same")
    return write({"question": chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]})


def _conversation(row: Mapping[str, Any], key: str) -> list[Message]:
    """The question in column `prompt`, if it is not in the column of the answer too, and the answer."""
    prompt, answer = _messages(row.get("prompt"), "user"), _messages(row.get(key), "assistant")
    if not answer:
        raise Unfit(f"their column '{key}' is missing or empty")
    whole = isinstance(answer[0], dict) and answer[0].get("role") in ("system", "user")
    messages = answer if whole else [*prompt, *answer]
    return messages_of({"messages": messages}, "messages")


def _messages(value: Any, role: str) -> list[Any]:
    """Of a text, which is one, or of a list of them."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    return value if isinstance(value, list) else []


def _said(text: str) -> str:
    pair = json.loads(text)
    return words_of([*pair["question"], pair["chosen"], pair["rejected"]])


def _encode_pair(text: str, tokenizer: Any, *, room: int, too_long: str) -> list[dict[str, Any]]:
    pair = json.loads(text)
    both = [encode([*pair["question"], pair[key]], tokenizer, "last") for key in ("chosen", "rejected")]
    longer = any(len(encoded.input_ids) > room for encoded in both)
    if longer and too_long == "drop":
        return [row_of([], tokenizer, fault=TOO_LONG, cut=True)]
    return [row_of([Encoded(each.input_ids[:room], each.trained[:room]) for each in both], tokenizer, cut=longer)]
