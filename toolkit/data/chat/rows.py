"""Rows of conversations, from wherever they lie, as canonical texts: the JSON of their messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from toolkit.config import ChatConfig
from toolkit.data.chat.messages import Layout, Message, messages_of
from toolkit.data.rows import gather_rows, write
from toolkit.data.text_corpus import TextCorpus

_WHAT = ("conversations", "say how they are laid out with --data.layout")


def conversations(config: ChatConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `messages_in`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no conversations.
    """
    canonical = partial(_conversation, layout=config.layout)
    return gather_rows(config, canonical, _WHAT, {"kind": "chat", "layout": config.layout}, said)


def _conversation(row: Mapping[str, Any], layout: Layout) -> str:
    return write(messages_of(row, layout))


def messages_in(text: str) -> list[Message]:
    """The conversation in a canonical text."""
    return json.loads(text)  # type: ignore[no-any-return]


def said(text: str) -> str:
    """What a canonical text says: its messages, but for the system's, which many conversations have in common."""
    return words_of(messages_in(text))


def words_of(messages: Iterable[Message]) -> str:
    """Of all but the system."""
    return "\n\n".join(message["content"] for message in messages if message["role"] != "system")
