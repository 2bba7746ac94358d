"""A conversation through a tokenizer's chat template: token ids, and which of them the model is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from toolkit.data.chat.messages import Message
from toolkit.data.rows import Unfit
from toolkit.errors import ConfigError


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it.

    Attributes:
        input_ids: of all of it.
        trained: for each token, whether the model is to write it: it is of an answer, or ends one.
    """

    input_ids: list[int]
    trained: list[bool]


def use_template(tokenizer: Any, file: Path | None) -> None:
    """Let a tokenizer have a template, from a file or its own, and one to learn answers from.

    Raises:
        ConfigError: there is none, it is malformed, or it ends no answer with a special token; or the tokenizer is a
            slow one.
    """
    if file is not None:
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--data.template {file} cannot be read: {error}", "Name a text file.") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            "the tokenizer is not of the library tokenizers, so that it cannot say which token is of which text",
            "Take a model with a tokenizer.json.",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, so that it is unknown how a conversation is written",
            "Take an instruction-tuned model, or give a template (Jinja) with --data.template.",
        )
    answer_end(tokenizer)


def answer_end(tokenizer: Any) -> int:
    """The token that ends an answer, by the tokenizer's template.

    Raises:
        ConfigError: there is none.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        encoded = encode(probe, tokenizer)
    except Unfit as error:
        raise ConfigError(f"the chat template does not serve: {error}", "Give another with --data.template.") from error
    last = max((at for at, trained in enumerate(encoded.trained) if trained), default=None)
    if last is None or encoded.input_ids[last] not in tokenizer.all_special_ids:
        raise ConfigError(
            "the chat template ends no answer with a special token, so that the model could not learn where to stop",
            "Let it write eos_token behind each answer.",
        )
    return encoded.input_ids[last]


def question(text: str, tokenizer: Any) -> list[int]:
    """A user's first message, up to where the answer begins."""
    asked = _rendered([{"role": "user", "content": text}], tokenizer, ask=True)
    return tokenizer(asked, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def encode(messages: Sequence[Message], tokenizer: Any, learn: Literal["all", "last"] = "all") -> Encoded:
    """A conversation as token ids.

    What is learnt is found in the text: from where the template asks for an answer to the end token behind it. So any
    template serves that writes the messages in their order, whether it marks the answers itself or not.

    Args:
        messages: ending with an answer.
        tokenizer: a fast one, with a chat template.
        learn: all answers, or the last one.

    Raises:
        Unfit: the template refuses the conversation, or writes earlier turns otherwise once later ones follow.
    """
    text = _rendered(messages, tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    special = set(tokenizer.all_special_ids)
    trained = [False] * len(ids)
    for number, message in enumerate(messages):
        last = number + 1 == len(messages)
        if message["role"] != "assistant" or (learn == "last" and not last):
            continue
        asked = _rendered(messages[:number], tokenizer, ask=True)
        answered = text if last else _rendered(messages[: number + 1], tokenizer)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise Unfit("the chat template writes earlier turns otherwise than the last (try --data.learn last)")
        inside = [at for at, (begin, end) in enumerate(offsets) if len(asked) <= begin and end <= len(answered)]
        # What follows the end token, a line break perhaps, the model never writes: it has stopped by then.
        stop = max((at for at in inside if ids[at] in special), default=len(ids))
        for at in inside:
            trained[at] = at <= stop
    return Encoded(ids, trained)


def _rendered(messages: Sequence[Message], tokenizer: Any, *, ask: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise Unfit(f"the chat template refuses them: {error}") from error
