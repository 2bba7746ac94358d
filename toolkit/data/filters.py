"""Texts that are not wanted: too short, too long, or in another language."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Features, Value

from toolkit.config import SourcesConfig
from toolkit.data.clean import DROPPED, TRAIN, Roles, normalised
from toolkit.data.contents import Contents
from toolkit.errors import ConfigError, nearest
from toolkit.requirements import optional

_LOOKED_AT = 1_000
"""Characters by which a text's language is told: more take longer and tell no better."""
_PART_OF = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "nn": "no", "sdh": "ku", "uzs": "uz"}
"""Languages that ISO 639-3 counts to another, and that are hard to tell from it in writing."""


def check_filters(config: SourcesConfig) -> None:
    """Refuse what cannot take effect.

    Raises:
        ConfigError: bounds that leave nothing, or a language that is not known.
    """
    if config.min_chars and config.max_chars and config.min_chars > config.max_chars:
        raise ConfigError(
            f"--data.min_chars {config.min_chars} and --data.max_chars {config.max_chars} leave no text",
            "Set the first no higher than the second.",
        )
    known = sorted({_PART_OF.get(label, label) for label in _identifier().labels}) if config.languages else []
    for language in config.languages:
        if language not in known:
            main = f" It counts as {_PART_OF[language]}." if language in _PART_OF else nearest(language, known)
            raise ConfigError(
                f"--data.languages: '{language}' is no language that can be told.{main}",
                f"Known are {', '.join(known)}.",
            )


def drop_unwanted(
    contents: Contents, kept: Roles, config: SourcesConfig
) -> tuple[Roles, dict[str, int], dict[str, int]]:
    """Drop texts of the training sources by length and language. Splits that are given stay as they are.

    Args:
        contents: of all rows.
        kept: split of each row, or `DROPPED`.
        config: the bounds, and the languages to keep.

    Returns:
        The new roles; how many rows were dropped for which reason; how many texts there were in each language.
    """
    if not (config.min_chars or config.max_chars or config.languages):
        return kept, {}, {}
    rows = np.flatnonzero(kept == TRAIN)
    features = {"characters": Value("int64")} | ({"language": Value("string")} if config.languages else {})
    measure = functools.partial(_measure, languages=bool(config.languages))
    columns = contents.measure(rows, measure, Features(features), "Measuring texts").with_format("numpy")[:]
    reasons = {}
    if config.min_chars:
        reasons["of too few characters"] = columns["characters"] < config.min_chars
    if config.max_chars:
        reasons["of too many characters"] = columns["characters"] > config.max_chars
    if config.languages:
        reasons["in another language"] = ~np.isin(columns["language"], config.languages)
    result, dropped = kept.copy(), {}
    for reason, unwanted in reasons.items():
        dropped[reason] = int(np.sum(result[rows[unwanted]] != DROPPED))  # each text for one reason
        result[rows[unwanted]] = DROPPED
    languages = Counter(columns["language"].tolist() if config.languages else ())
    return result, dropped, dict(languages.most_common())


def _measure(texts: Sequence[str], *, languages: bool) -> dict[str, Any]:
    plain = [normalised(text) for text in texts]
    told = {"language": [_language(text) for text in plain]} if languages else {}
    return {"characters": [len(text) for text in plain]} | told


def _language(text: str) -> str:
    label: str = _identifier().classify(text[:_LOOKED_AT])[0]
    return _PART_OF.get(label, label)


@functools.cache
def _identifier() -> Any:
    langid = optional("py3langid.langid", "--data.languages", "clean")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
