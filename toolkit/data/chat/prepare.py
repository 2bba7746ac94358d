"""Conversations as sequences of tokens, with what of each is learnt."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from toolkit.config import ChatConfig, PairsConfig
from toolkit.data.chat.encode import Encoded, encode
from toolkit.data.chat.rows import messages_in
from toolkit.data.examples import encode_rows, fit_rows
from toolkit.data.files import ROLES, Role
from toolkit.data.language import LanguageData
from toolkit.data.mapping import quiet
from toolkit.data.mixture import check_weights, count_sources, mixed
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram, tokenizer_fingerprint
from toolkit.errors import DataError

_REVISION = 2
"""To be raised with every change of this package that changes its result: older caches are then not used."""
TOO_LONG, OUT_OF_REACH = "too long", "without an answer within --data.max_length"
FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "trained": ListOf(Value("bool")),
        "pieces": ListOf(Value("int32")),
        "length": Value("int32"),
        "bytes": Value("int64"),
        "cut": Value("bool"),
        "endless": Value("bool"),
    }
)

EncodeOne = Callable[..., list[dict[str, Any]]]
"""Makes rows of a text and, by its name, the `tokenizer`."""


def chat(config: ChatConfig, corpus: TextCorpus, tokenizer: Any) -> LanguageData:
    """Write every conversation with the template and tokenise it; the second call with the same content loads it.

    To be called before the process group exists, on all ranks, as `conversations`.

    Returns:
        As `language`, a conversation a row, with more columns: `trained` (list of bool, as many as `input_ids`),
        whether each token is to be learnt; `number`, among the rows of all splits. `bytes` are those of the text that
        is learnt.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many conversations are unfit, or a split has none left.
    """
    encode_one = functools.partial(encode_chat, learn=config.learn, room=config.max_length, too_long=config.too_long)
    settings = ["chat", config.max_length, config.too_long, config.learn]
    return sequences(config, corpus, tokenizer, encode_one, settings)


def sequences(
    config: ChatConfig | PairsConfig, corpus: TextCorpus, tokenizer: Any, encode_one: EncodeOne, settings: Sequence[Any]
) -> LanguageData:
    """The same for texts that `encode_one` makes rows of.

    Args:
        config: how they are mixed.
        corpus: canonical texts.
        tokenizer: with a chat template.
        encode_one: makes rows of `FEATURES`, and maybe a `fault`, of a text and the `tokenizer`; picklable.
        settings: what it goes by, fit for JSON.
    """
    check_weights(config)
    content = [corpus.fingerprint, tokenizer_fingerprint(tokenizer), tokenizer.chat_template]
    name = fingerprint(_REVISION, content, *settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, corpus, tokenizer, encode_one))
    train, passes = mixed(splits["train"], facts["sequences_of_source"], config)
    facts = (
        corpus.facts
        | facts
        | {
            "passes": passes,
            "dropped": corpus.facts["dropped"] | facts["left_out"],
            "warnings": corpus.facts["warnings"] + facts["warnings"],
        }
    )
    return LanguageData(train, splits["validation"], splits["test"], facts, fingerprint(name, config.weights))


def _prepare(
    config: ChatConfig | PairsConfig,
    corpus: TextCorpus,
    tokenizer: Any,
    encode_one: EncodeOne,
    result: Path,
    scratch: Path,
) -> None:
    """Write the splits and their facts to `result`."""
    facts: dict[str, Any] = {"token_lengths": {"edges": EDGES}}
    splits: dict[Role, Dataset] = {}
    faults: Counter[str] = Counter()
    for name in ROLES:
        encode = functools.partial(encode_one, tokenizer=tokenizer)
        title = f"Tokenizing {name}"
        rows = encode_rows(config, corpus.splits[name], encode, FEATURES, scratch=scratch, title=title)
        kept, columns = fit_rows(rows, faults), rows.select_columns(["cut", "endless"]).with_format("arrow")[:]
        _check(name, len(kept), faults, config)
        lengths, trained = np.asarray(kept["length"]), kept.with_format("arrow")[:].column("trained")
        facts.setdefault("sequences", {})[name] = len(kept)
        facts.setdefault("tokens", {})[name] = int(lengths.sum())
        facts.setdefault("learnt", {})[name] = pc.sum(pc.list_flatten(trained)).as_py()
        facts.setdefault("cut", {})[name] = pc.mean(columns.column("cut")).as_py()
        facts.setdefault("endless", {})[name] = pc.sum(columns.column("endless")).as_py()
        facts["token_lengths"][name] = length_histogram(lengths)
        if name == "train":
            facts["sequences_of_source"] = count_sources(kept["source"], config.name)
        kept = kept.select_columns(["input_ids", "trained", "pieces", "length", "bytes"])
        with quiet(bars=False):
            ids, before = np.arange(len(kept)), sum(map(len, splits.values()))
            splits[name] = kept.add_column("id", ids).add_column("number", before + ids)
    save_splits(result, splits, facts | _told(faults))


def _check(name: Role, left: int, faults: Counter[str], config: ChatConfig | PairsConfig) -> None:
    refused = {reason: count for reason, count in faults.items() if reason not in (TOO_LONG, OUT_OF_REACH)}
    if sum(refused.values()) > config.max_bad_rows:
        raise DataError(
            f"the chat template does not serve {sum(refused.values())} of the conversations: {'; '.join(refused)}",
            "Give another with --data.template, mend the conversations, or raise --data.max_bad_rows.",
        )
    if not left:
        raise DataError(
            f"the {name} split has no conversations left to learn from ({'; '.join(faults)})",
            "Give others, or raise --data.max_length.",
        )


def _told(faults: Counter[str]) -> dict[str, Any]:
    """What was left out, and the warnings of it."""
    warnings = [f"{count:,} conversations are left out: {reason}" for reason, count in faults.most_common(5)]
    by_length = {reason: faults[reason] for reason in (TOO_LONG, OUT_OF_REACH)}
    others = faults.total() - sum(by_length.values())
    return {"left_out": by_length | {"refused by the template": others}, "warnings": warnings}


def encode_chat(text: str, tokenizer: Any, *, learn: Any, room: int, too_long: str) -> list[dict[str, Any]]:
    """A conversation as a row, or as several.

    Raises:
        Unfit: the template does not serve.
    """
    encoded = encode(messages_in(text), tokenizer, learn)
    longer = len(encoded.input_ids) > room
    if longer and too_long == "drop":
        return [row_of([], tokenizer, fault=TOO_LONG, cut=True)]
    ends = range(room, len(encoded.input_ids) + room, room) if too_long == "split" else [room]
    pieces = [Encoded(encoded.input_ids[end - room : end], encoded.trained[end - room : end]) for end in ends]
    return [row_of([piece], tokenizer, cut=longer) for piece in pieces]


def row_of(pieces: Sequence[Encoded], tokenizer: Any, *, fault: str | None = None, cut: bool = False) -> dict[str, Any]:
    """Pieces end to end; one with nothing to learn makes them unfit."""
    trained = [mark for piece in pieces for mark in piece.trained]
    learnt = [[token for token, mark in zip(p.input_ids, p.trained, strict=True) if mark] for p in pieces]
    # The first token of a sequence is given, and never learnt.
    if not fault and not all(any(piece.trained[1:]) for piece in pieces):
        fault = OUT_OF_REACH
    return {
        "input_ids": [token for piece in pieces for token in piece.input_ids],
        "trained": trained,
        "pieces": [len(piece.input_ids) for piece in pieces],
        "length": len(trained),
        "bytes": sum(len(tokenizer.decode(tokens, skip_special_tokens=True).encode()) for tokens in learnt),
        "cut": cut,
        # An answer that is cut off ends with none of the tokens that end one.
        "endless": cut
        and any(
            piece.trained[-1:] == [True] and tokens[-1] not in tokenizer.all_special_ids
            for piece, tokens in zip(pieces, learnt, strict=True)
        ),
        "fault": fault,
    }
