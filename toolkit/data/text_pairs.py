"""Texts with what is to be written for each: from rows to tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from toolkit.config import EncoderDecoderConfig, TextPairsConfig, TokenizerConfig
from toolkit.data.bpe import trained_tokenizer
from toolkit.data.chat.encode import answer_end, question
from toolkit.data.examples import Examples, examples
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import encode, tokenizer_fingerprint
from toolkit.errors import ConfigError
from toolkit.models import load_tokenizer

_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_WHAT = ("pairs of texts", "name their columns with --data.source and --data.target")
FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "length": Value("int32"),
        "cut": Value("bool"),
        "given": Value("string"),
        "wanted": Value("string"),
    }
)


def text_pairs(config: TextPairsConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `encode_pairs`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no pairs.
    """
    if config.source == config.target:
        raise ConfigError(
            f"--data.source and --data.target both name the column '{config.source}'", "Name that of the targets."
        )
    canonical = functools.partial(_canonical, source=config.source, target=config.target)
    settings = {"kind": "text pairs", "source": config.source, "target": config.target}
    return gather_rows(config, canonical, _WHAT, settings, both_texts)


def pairs_tokenizer(model: EncoderDecoderConfig, config: TokenizerConfig, corpus: TextCorpus) -> Any:
    """The tokenizer of the model to go on from, else one that is named, else one trained on both sides of the pairs.

    Raises:
        ConfigError: a setting without effect on one that is there.
        ModelError: there is none under that name.
    """
    named = model.name or config.name
    if named is None:
        return trained_tokenizer(corpus, config.vocabulary, config.train_bytes, words=both_texts, ends=True)
    if model.name is not None and config.name is not None:
        raise ConfigError(
            f"--tokenizer.name {config.name} has no effect beside --model.name {model.name}, which has its own",
            "Drop one of the two.",
        )
    return load_tokenizer(EncoderDecoderConfig(name=named, revision=model.revision))


def encode_pairs(config: TextPairsConfig, corpus: TextCorpus, tokenizer: Any, asked: str | None = None) -> Examples:
    """Cut every pair into tokens; the second call with the same content loads it.

    To be called before the process group exists, on all ranks, as `text_pairs`.

    Args:
        config: to how many tokens they are cut, and how they are mixed.
        corpus: of `text_pairs`.
        tokenizer: of transformers; its special tokens are put where they belong.
        asked: for a chat model, which is given each source as a user's message behind this instruction.

    Returns:
        Columns `input_ids` and `labels` (lists of int: what is given, and what is to be written), `length` (of both
        together), `cut` (bool), `given` and `wanted` (the two texts, as they were), `id`.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many pairs are unfit, or a split has none left.
    """
    prefix = getattr(config, "prefix", "")
    languages = [getattr(tokenizer, f"{side}_lang", None) for side in ("src", "tgt")]
    settings = ["text pairs", _REVISION, config.max_length, config.max_target_length, prefix, languages, asked]
    if asked is not None:
        settings.append(tokenizer.chat_template)
    encode_one = functools.partial(
        _encode,
        tokenizer=tokenizer,
        room=config.max_length,
        target_room=config.max_target_length,
        prefix=prefix,
        asked=asked,
    )
    return examples(config, corpus, encode_one, FEATURES, [*settings, tokenizer_fingerprint(tokenizer)])


def source_tokens(text: str, tokenizer: Any, room: int, *, prefix: str = "", asked: str | None = None) -> list[int]:
    """What a model is given for a text, which is cut to `room` tokens.

    Args:
        text: a source.
        tokenizer: of the model.
        room: tokens at most; special ones are among them for an encoder, and those of a chat template are not.
        prefix: put before the text.
        asked: for a chat model, which is given the text as a user's message behind this instruction.
    """
    if asked is None:
        return encode([prefix + text], tokenizer, room)["input_ids"][0]  # type: ignore[no-any-return]
    found = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=room, return_offsets_mapping=True, verbose=False
    )
    end = max((end for _, end in found["offset_mapping"]), default=0)
    return question("\n\n".join(filter(None, (asked, text[:end]))), tokenizer)


def both_texts(text: str) -> str:
    """The two texts of a canonical one."""
    return "\n".join(json.loads(text))


def _canonical(row: Mapping[str, Any], source: str, target: str) -> str:
    texts = []
    for column in (source, target):
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            what = "missing or empty" if value is None or isinstance(value, str) else f"of type {type(value).__name__}"
            raise Unfit(f"their column '{column}' is {what}")
        texts.append(value.strip())
    return write(texts)


def _encode(
    pair: tuple[str, str], *, tokenizer: Any, room: int, target_room: int, prefix: str, asked: str | None
) -> list[dict[str, Any]]:
    source, target = pair
    given = source_tokens(source, tokenizer, room, prefix=prefix, asked=asked)
    if asked is None:
        options = {"add_special_tokens": True, "verbose": False, "return_attention_mask": False}
        written = tokenizer(text_target=target, **options)["input_ids"]
        # Where a target's end is cut off, so is the token that ends it: the model does not learn to end there.
        cut = len(written) > target_room
        whole = len(tokenizer(prefix + source, **options)["input_ids"])
    else:
        written = [*tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"], answer_end(tokenizer)]
        cut = len(written) > target_room
        whole = len(source_tokens(source, tokenizer, 10**9, asked=asked))
    if not written:
        raise Unfit("their target has no tokens")
    return [
        {
            "input_ids": given,
            "labels": written[:target_room],
            "length": len(given) + min(len(written), target_room),
            "cut": cut or whole > len(given),
            "given": source,
            "wanted": target,
        }
    ]
