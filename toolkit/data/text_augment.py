"""Training texts, varied: words left out, moved or replaced by others of the same meaning.

Random deletion, swap and replacement of Wei and Zou 2019 (EDA), on tokens and anew in each epoch. What is done to a
text is a pure function of the seed, the epoch and the sample, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.config import TextAugmentConfig
from toolkit.data.files import open_file
from toolkit.errors import ConfigError, DataError

Tokens = tuple[int, ...]


class TextAugmentation:
    """Varies the tokens of a text.

    Args:
        config: how often, and by what.
        tokenizer: of the tokens; its special ones stay where they are.
        seed: of the run.
        longest: tokens of a text that the model takes; None for any number.

    Raises:
        ConfigError: replacement without synonyms, or synonyms that nothing is replaced by.
        DataError: the file of synonyms cannot be read, or the tokenizer knows none of its words.
    """

    def __init__(self, config: TextAugmentConfig, tokenizer: Any, *, seed: int, longest: int | None = None) -> None:
        if (config.synonyms is None) != (config.replace == 0):
            raise ConfigError(
                f"--augment.replace {config.replace:g} and --augment.synonyms {config.synonyms} need each other",
                "Give both, or none.",
            )
        self._config = config
        self._seed = seed
        self._longest = longest
        self._special = frozenset(tokenizer.all_special_ids)
        self._inside = _inner_tokens(tokenizer) if config.synonyms else frozenset()
        self._others = _synonyms(config.synonyms, tokenizer) if config.synonyms else {}
        self._most = max(map(len, self._others), default=0)

    def __call__(self, tokens: Sequence[int], epoch: int, sample: int) -> list[int]:
        """The tokens of a sample as they are in an epoch."""
        draw = np.random.default_rng([self._seed, epoch, sample])
        result = self._replaced(list(tokens), draw)
        result = self._swapped(result, draw)
        return self._deleted(result, draw)

    def _replaced(self, tokens: list[int], draw: np.random.Generator) -> list[int]:
        result: list[int] = []
        at = 0
        while at < len(tokens):
            found = self._word_at(tokens, at)
            if found and draw.random() < self._config.replace:
                choice = self._others[found][int(draw.integers(len(self._others[found])))]
                rest = len(tokens) - at - len(found)
                fits = self._longest is None or len(result) + len(choice) + rest <= self._longest
                result += choice if fits else found
            else:
                found = found or (tokens[at],)
                result += found
            at += len(found)
        return result

    def _word_at(self, tokens: Sequence[int], at: int) -> Tokens:
        """The longest word with synonyms that begins there, and ends with a word; empty where there is none."""
        if not self._others or tokens[at] in self._inside:
            return ()
        for size in range(min(self._most, len(tokens) - at), 0, -1):
            word = tuple(tokens[at : at + size])
            ends = at + size == len(tokens) or tokens[at + size] not in self._inside
            if ends and word in self._others:
                return word
        return ()

    def _swapped(self, tokens: list[int], draw: np.random.Generator) -> list[int]:
        free = [place for place, token in enumerate(tokens) if token not in self._special]
        for _ in range(draw.binomial(len(free), self._config.swap) if len(free) > 1 else 0):
            one, other = (free[place] for place in draw.choice(len(free), 2, replace=False))
            tokens[one], tokens[other] = tokens[other], tokens[one]
        return tokens

    def _deleted(self, tokens: list[int], draw: np.random.Generator) -> list[int]:
        keep = draw.random(len(tokens)) >= self._config.delete
        left = [token for token, stays in zip(tokens, keep, strict=True) if stays or token in self._special]
        # A text of nothing is none.
        return left if any(token not in self._special for token in left) else tokens


def _inner_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that go on with a word: the `##ing` of WordPiece, and what lacks the mark of a blank that others have."""
    names = tokenizer.get_vocab()
    marks = ("▁", "Ġ")
    if any(name.startswith("##") for name in names):
        return frozenset(index for name, index in names.items() if name.startswith("##"))
    if sum(name.startswith(marks) for name in names) < len(names) / 4:
        return frozenset()  # characters, or words alone
    return frozenset(
        index for name, index in names.items() if not name.startswith(marks) and name.isascii() and name.isalpha()
    )


def _synonyms(file: Path, tokenizer: Any) -> dict[Tokens, list[Tokens]]:
    """Words as tokens, with the others of their lines."""
    found: dict[Tokens, list[Tokens]] = {}
    unknown = tokenizer.unk_token_id
    for number, line in enumerate(_lines(file), start=1):
        words = [word.strip() for word in line.replace("\t", ",").replace("，", ",").split(",") if word.strip()]
        if len(words) == 1:
            raise DataError(
                f"{file}, line {number}: '{words[0][:40]}' stands alone",
                "A line holds words of one meaning, with commas or tabs between them: quick, fast, rapid.",
            )
        for before in (" ", ""):  # behind a blank, and, as in Chinese, behind another word
            forms = [tuple(tokenizer(before + word, add_special_tokens=False)["input_ids"]) for word in words]
            known = [form for form in dict.fromkeys(forms) if form and unknown not in form]
            for form in known:
                if others := [other for other in known if other != form]:
                    found[form] = list(dict.fromkeys(found.get(form, []) + others))
    if not found:
        raise DataError(f"{file} has no two words of one meaning that the tokenizer knows", "Give another file.")
    return found


def _lines(file: Path) -> list[str]:
    try:
        with open_file(file) as raw:
            return [line for line in raw.read().decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--augment.synonyms {file} cannot be read: {error}", "Give a text file in UTF-8.") from error


def text_augmentation(
    config: TextAugmentConfig, tokenizer: Any, *, seed: int, limits: Mapping[str, int | None], pairs: bool = False
) -> TextAugmentation | None:
    """What varies training texts; None where nothing is to be done.

    Args:
        config: how often, and by what.
        tokenizer: of the texts.
        seed: of the run.
        limits: from `input_limits`.
        pairs: the texts are pairs, whose tokens must stay on their side.

    Raises:
        ConfigError, DataError: as `TextAugmentation`; and where pairs were to be varied.
    """
    if not (config.delete or config.swap or config.replace or config.synonyms):
        return None
    if pairs:
        raise ConfigError("--augment has no effect on pairs of texts", "Leave it out, or --data.text_pair.")
    return TextAugmentation(config, tokenizer, seed=seed, longest=limits["positions"])
