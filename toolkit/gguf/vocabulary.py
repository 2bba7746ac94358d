"""A tokenizer as GGUF holds it: byte-level BPE, whose way of splitting text has a name that readers know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType

from toolkit.data import answer_end
from toolkit.errors import ConfigError, ModelError

_BYTES, _BYTES_OF_WORDS = ("ByteLevel", False, False), ("ByteLevel", False, True)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

SPLITS: dict[tuple[object, ...], str] = {
    (_BYTES_OF_WORDS,): "gpt-2",
    (("Digits", True), _BYTES_OF_WORDS): "smollm",
    (("Split", _QWEN2, "Isolated", False), _BYTES): "qwen2",
    (("Split", _LLAMA3, "Isolated", False), _BYTES): "llama-bpe",
}
"""How a text is split before the merges → what GGUF's readers call that. Tokenizers that are trained here: `smollm`."""

_WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Where a piece that is a token is taken as it is, whatever the merges would make of it."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of the tokenizer.

    Attributes:
        split: name of the way in which texts are split.
        tokens, types: by id, one for each row of the embedding.
        merges: the earliest first.
        special: id by role, as `bos`.
        begins: a text is to begin with `bos`: where the tokenizer has it so, and where there is no template, since
            texts are trained on with a token before them.
        template: of conversations; empty where there is none.
    """

    split: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    special: dict[str, int]
    begins: bool
    template: str

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Enter it into a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(False)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, rows: int, ends: Any = None) -> Vocabulary:
    """What GGUF holds of a tokenizer.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the embedding; those that no token stands for are named `[PAD…]`.
        ends: token or tokens that end what the model writes, beside the tokenizer's own.

    Raises:
        ModelError: GGUF's readers would split a text otherwise, or not know the tokens.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    split = _split(parts)
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise ModelError(
            f"the tokenizer has tokens up to {max(ids.values())}, and the model embeddings for {rows}",
            "Put the model's own tokenizer into its folder.",
        )
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [TokenType.UNUSED] * rows
    for token, row in ids.items():
        tokens[row], types[row] = token, TokenType.NORMAL
    for row, added in tokenizer.added_tokens_decoder.items():
        if added.lstrip or added.rstrip or added.single_word:
            raise ModelError(
                f"the token {added.content} takes in the spaces beside it, or only stands between words, which a GGUF "
                "file cannot tell",
                "Set its lstrip, rstrip and single_word to false in tokenizer.json, and train with that.",
            )
        types[row] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    begins = not template or tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Vocabulary(split, tokens, types, merges, _special(tokenizer, ends), begins, template)


def _split(parts: Mapping[str, Any]) -> str:
    model = parts["model"]
    if model["type"] != "BPE" or model["byte_fallback"]:
        raise ModelError(
            "the tokenizer is no byte-level BPE, and this command can write no other",
            "Train with a tokenizer of that kind, as pretrain_lm makes them.",
        )
    split = SPLITS.get(tuple(_shapes(parts["pre_tokenizer"])))
    # Qwen's tokenizers compose accents (NFC) first; readers leave texts as they are, which mostly are composed.
    changes = (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC"
    pieces = any(model[key] for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    if split is None or changes or pieces or bool(model["ignore_merges"]) != (split in _WHOLE_WORDS_FIRST):
        raise ModelError(
            "the tokenizer splits texts in a way that GGUF has no name for, so that readers would make other tokens",
            f"Those of {', '.join(SPLITS.values())} are known.",
        )
    return split


def _shapes(part: Mapping[str, Any] | None) -> Iterator[tuple[object, ...]]:
    """What a pre-tokenizer does, step by step."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part["pretokenizers"]:
            yield from _shapes(inner)
    elif part["type"] == "Split":
        yield "Split", part["pattern"].get("Regex"), part["behavior"], part["invert"]
    elif part["type"] == "Digits":
        yield "Digits", part["individual_digits"]
    elif part["type"] == "ByteLevel":
        yield "ByteLevel", part["add_prefix_space"], part["use_regex"]
    else:
        yield (part["type"],)


def _special(tokenizer: Any, ends: Any) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    if found["bos"] is None:  # as in training, where the token that ends a text begins the next one
        found["bos"] = found["eos"]
    others = [*ends] if isinstance(ends, list) else [ends]
    if tokenizer.chat_template:
        with suppress(ConfigError):
            others.append(answer_end(tokenizer))
    found["eot"] = next((token for token in others if token not in (None, found["eos"])), None)
    return {role: token for role, token in found.items() if token is not None}
