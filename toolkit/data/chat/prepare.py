"""Conversations as sequences of tokens, with what of each is learnt."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as ListOf

from toolkit.config import ChatConfig
from toolkit.data.chat.encode import Encoded, encode
from toolkit.data.chat.messages import Unfit
from toolkit.data.chat.rows import messages_in
from toolkit.data.files import ROLES, Role
from toolkit.data.language import LanguageData
from toolkit.data.mapping import map_texts, quiet
from toolkit.data.mixture import check_weights, count_sources, mixed
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram, tokenizer_fingerprint
from toolkit.errors import DataError

_REVISION = 1
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_TOO_LONG, _OUT_OF_REACH = "too long", "without an answer within --data.max_length"
_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "trained": ListOf(Value("bool")),
        "pieces": ListOf(Value("int32")),
        "length": Value("int32"),
        "bytes": Value("int64"),
        "source": Value("int32"),
        "cut": Value("bool"),
        "endless": Value("bool"),
        "fault": Value("string"),
    }
)


def chat(config: ChatConfig, corpus: TextCorpus, tokenizer: Any) -> LanguageData:
    """Write every conversation with the template and tokenise it; the second call with the same content loads it.

    To be called before the process group exists, on all ranks, as `conversations`.

    Returns:
        As `language`, a conversation a row, with one more column: `trained` (list of bool, as many as `input_ids`),
        whether each token is to be learnt; `bytes` are those of the text that is.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many conversations are unfit, or a split has none left.
    """
    check_weights(config)
    content = [corpus.fingerprint, tokenizer_fingerprint(tokenizer), tokenizer.chat_template]
    name = fingerprint("chat", _REVISION, content, config.max_length, config.too_long, config.learn)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, corpus, tokenizer))
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


def _prepare(config: ChatConfig, corpus: TextCorpus, tokenizer: Any, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    facts: dict[str, Any] = {"token_lengths": {"edges": EDGES}}
    splits: dict[Role, Dataset] = {}
    faults: Counter[str] = Counter()
    for name in ROLES:
        rows = _encoded(config, corpus.splits[name], tokenizer, name, scratch)
        columns = rows.select_columns(["cut", "endless", "fault"]).with_format("arrow")[:]
        faults.update(columns.column("fault").drop_null().to_pylist())
        kept = rows.select(np.flatnonzero(columns.column("fault").is_null().to_numpy()))
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
            splits[name] = kept.add_column("id", np.arange(len(kept)))
    save_splits(result, splits, facts | _told(faults))


def _check(name: Role, left: int, faults: Counter[str], config: ChatConfig) -> None:
    refused = {reason: count for reason, count in faults.items() if reason not in (_TOO_LONG, _OUT_OF_REACH)}
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
    by_length = {reason: faults[reason] for reason in (_TOO_LONG, _OUT_OF_REACH)}
    others = faults.total() - sum(by_length.values())
    return {"left_out": by_length | {"refused by the template": others}, "warnings": warnings}


def _encoded(config: ChatConfig, texts: Dataset, tokenizer: Any, name: Role, scratch: Path) -> Dataset:
    """All conversations of a split, the unfit ones too, those of each source together."""
    sources = np.asarray(texts["source"])
    tables = []
    for source in np.unique(sources):
        encode_some = functools.partial(
            _encode,
            tokenizer=tokenizer,
            learn=config.learn,
            room=config.max_length,
            too_long=config.too_long,
            source=int(source),
        )
        tables.append(
            map_texts(
                texts.select(np.flatnonzero(sources == source)).select_columns("text"),
                encode_some,
                _FEATURES,
                processes=config.tokenize_processes,
                scratch=scratch,
                title=f"Tokenizing {name} {source + 1}",
            )
        )
    return concatenate_datasets(tables)


def _encode(texts: list[str], *, tokenizer: Any, learn: Any, room: int, too_long: str, source: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for text in texts:
        try:
            encoded = encode(messages_in(text), tokenizer, learn)
        except Unfit as reason:
            rows.append(_row(Encoded([], []), tokenizer, fault=str(reason)))
            continue
        longer = len(encoded.input_ids) > room
        if longer and too_long == "drop":
            rows.append(_row(Encoded([], []), tokenizer, fault=_TOO_LONG, cut=True))
            continue
        ends = range(room, len(encoded.input_ids) + room, room) if too_long == "split" else [room]
        for end in ends:
            piece = Encoded(encoded.input_ids[end - room : end], encoded.trained[end - room : end])
            # The first token of a sequence is given, and never learnt.
            fault = None if any(piece.trained[1:]) else _OUT_OF_REACH
            rows.append(_row(piece, tokenizer, fault=fault, cut=longer))
    return {name: [source if name == "source" else row[name] for row in rows] for name in _FEATURES}


def _row(piece: Encoded, tokenizer: Any, *, fault: str | None = None, cut: bool = False) -> dict[str, Any]:
    learnt = [token for token, trained in zip(piece.input_ids, piece.trained, strict=True) if trained]
    return {
        "input_ids": piece.input_ids,
        "trained": piece.trained,
        "pieces": [len(piece.input_ids)],
        "length": len(piece.input_ids),
        "bytes": len(tokenizer.decode(learnt, skip_special_tokens=True).encode()),
        "cut": cut,
        # An answer that is cut off ends with none of the tokens that end one.
        "endless": cut and bool(piece.trained[-1:] == [True]) and learnt[-1] not in tokenizer.all_special_ids,
        "fault": fault,
    }
