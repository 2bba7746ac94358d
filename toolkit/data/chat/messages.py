"""Conversations in the layouts that they come in, as messages; and what a conversation to learn from must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from toolkit.data.rows import Unfit

Message = dict[str, str]
"""`role` (system, user, assistant or tool) and `content`."""
Layout = Literal["auto", "messages", "sharegpt", "alpaca"]

_ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant", "observation": "tool"}
_COLUMNS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
"""By which the layout of a row is known."""
_NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow which; the first may begin."""


def messages_of(row: Mapping[str, Any], layout: Layout) -> list[Message]:
    """The conversation in a row of a data set.

    Args:
        row: its columns.
        layout: how it is laid out; `auto` goes by the columns.

    Raises:
        Unfit: it is laid out otherwise, roles are unknown or out of order, or a message is empty.
    """
    if layout == "auto":
        layout = _layout(row)
    if layout == "alpaca":
        messages = _alpaca(row)
    elif layout == "sharegpt":
        messages = [_message(turn, "from", "value", _SHAREGPT_ROLES) for turn in _turns(row, "conversations")]
    else:
        messages = [_message(turn, "role", "content", _ROLES) for turn in _turns(row, "messages")]
    _check(messages)
    return messages


def _layout(row: Mapping[str, Any]) -> Layout:
    for layout, columns in _COLUMNS.items():
        if all(row.get(column) is not None for column in columns):
            return layout
    wanted = "; ".join(" and ".join(columns) for columns in _COLUMNS.values())
    raise Unfit(f"they have none of these columns: {wanted}")


def _check(messages: Sequence[Message]) -> None:
    before = ""
    for message in messages:
        role = message["role"]
        if role not in _NEXT[before]:
            raise Unfit(f"a message of the {role} " + (f"follows one of the {before}" if before else "comes first"))
        if role != "system" and not message["content"].strip():
            raise Unfit(f"a message of the {role} is empty")
        before = role
    if before != "assistant":
        raise Unfit("they do not end with an answer of the assistant")


def _turns(row: Mapping[str, Any], column: str) -> list[Any]:
    turns = row.get(column)
    if isinstance(turns, str):  # as tables of CSV hold it
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError:
            raise Unfit(f"their column '{column}' is not JSON") from None
    if not isinstance(turns, list) or not turns:
        raise Unfit(f"their column '{column}' holds no list of messages")
    return turns


def _message(turn: Any, role: str, content: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict) or role not in turn or content not in turn:
        raise Unfit(f"a message lacks '{role}' or '{content}'")
    if turn[role] not in roles:
        raise Unfit(f"'{turn[role]}' is none of the roles {', '.join(roles)}")
    if not isinstance(turn[content], str):
        raise Unfit(f"the content of a message is not text but of the type {type(turn[content]).__name__}")
    return {"role": roles[turn[role]], "content": turn[content]}


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    parts = {key: row.get(key) or "" for key in ("system", "instruction", "input", "output")}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise Unfit(f"their column '{key}' is not text but of the type {type(value).__name__}")
    question = "\n\n".join(filter(None, (parts["instruction"], parts["input"])))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]
    return [{"role": "system", "content": parts["system"]}, *messages] if parts["system"] else messages
