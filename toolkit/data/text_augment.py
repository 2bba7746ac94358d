"""Training texts, varied: other wordings; words left out, moved or replaced by others of the same meaning; mixtures.

Random deletion, swap and replacement of Wei and Zou 2019 (EDA), on tokens and anew in each epoch. What is done to a
text is a pure function of the seed, the epoch and the sample, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from toolkit.config import Normalisation, TextAugmentConfig
from toolkit.data.files import open_file
from toolkit.data.tokenize import encode
from toolkit.errors import ConfigError, DataError
from toolkit.normalise import normalise
from toolkit.text_files import of_row, read_rows

Tokens = tuple[int, ...]
Vary = Callable[[Sequence[int], int, int], list[int]]
"""The tokens of a sample as they are in an epoch, given that and its id."""
_UNLIMITED = 2**31 - 1
_LOOKED_AT = 10_000


class TextAugmentation:
    """Varies the tokens of a text.

    Args:
        config: how often, and by what.
        tokenizer: of the tokens; its special ones stay where they are.
        seed: of the run.
        longest: tokens of a text that the model takes; None for any number.
        steps: how the run brings texts into one form.

    Raises:
        ConfigError: replacement without synonyms, or synonyms that nothing is replaced by; the same of paraphrases.
        DataError: a file cannot be read, or the tokenizer knows none of its words.
    """

    def __init__(
        self,
        config: TextAugmentConfig,
        tokenizer: Any,
        *,
        seed: int,
        longest: int | None = None,
        steps: Sequence[Normalisation] = (),
    ) -> None:
        for name, share, file in (
            ("replace", config.replace, "synonyms"),
            ("paraphrase", config.paraphrase, "paraphrases"),
        ):
            path = getattr(config, file)
            if (path is None) != (share == 0):
                raise ConfigError(
                    f"--augment.{name} {share:g} and --augment.{file} {path} need each other", "Give both, or none."
                )
        self._config = config
        self._seed = seed
        self._longest = longest
        self._special = frozenset(tokenizer.all_special_ids)
        self._inside = _inner_tokens(tokenizer) if config.synonyms else frozenset()
        self._others = _synonyms(config.synonyms, tokenizer) if config.synonyms else {}
        self._most = max(map(len, self._others), default=0)
        options: dict[str, Any] = {"steps": steps, "length": longest or _UNLIMITED}
        self._wordings = _wordings(config.paraphrases, tokenizer, **options) if config.paraphrases else {}

    def __call__(self, tokens: Sequence[int], epoch: int, sample: int) -> list[int]:
        """The tokens of a sample as they are in an epoch."""
        draw = np.random.default_rng([self._seed, epoch, sample])
        result = self._replaced(self._reworded(list(tokens), draw), draw)
        result = self._swapped(result, draw)
        return self._deleted(result, draw)

    def check_rows(self, rows: Dataset) -> None:
        """Raises DataError where none of (the first of) the training texts has another wording."""
        looked_at = rows.select(range(min(_LOOKED_AT, len(rows))))["input_ids"] if self._wordings else ()
        if self._wordings and not any(tuple(tokens) in self._wordings for tokens in looked_at):
            raise DataError(
                f"--augment.paraphrases {self._config.paraphrases} has no other wording of a training text",
                "Its column 'text' must hold training texts as they are.",
            )

    def _reworded(self, tokens: list[int], draw: np.random.Generator) -> list[int]:
        found = self._wordings.get(tuple(tokens))
        if not found or draw.random() >= self._config.paraphrase:
            return tokens
        return list(found[int(draw.integers(len(found)))])

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


class TextMixup:
    """Lets a text end with the end of another one, and mixes their labels as much.

    CutMix (Yun et al. 2019) along the one direction that texts have, with a partner from all training texts, not from
    the batch: the same on any number of processes.

    Args:
        spread: the share that a text keeps is drawn from Beta(spread, spread).
        rows: of the training data, with columns `input_ids` and `label`.
        classes: there are; 0 where a label is a number, or one for each of several labels.
        special: tokens that stay where they are.
        seed: of the run.
        vary: what is done to both texts first.
    """

    def __init__(
        self, spread: float, rows: Dataset, *, classes: int, special: Sequence[int], seed: int, vary: Vary
    ) -> None:
        self._spread = spread
        self._rows = rows
        self._classes = classes
        self._special = frozenset(special)
        self._seed = seed
        self._vary = vary

    def __call__(self, tokens: Sequence[int], label: Any, epoch: int, sample: int) -> tuple[list[int], Any]:
        """A sample as it is in an epoch: its tokens; of classes the share of each, of others the mean label."""
        draw = np.random.default_rng([self._seed, epoch, sample, 1])  # not the numbers by which tokens are varied
        keep = float(draw.beta(self._spread, self._spread))
        partner = self._rows[int(draw.integers(len(self._rows)))]
        own, other = self._vary(tokens, epoch, sample), self._vary(partner["input_ids"], epoch, sample)
        places = [place for place, token in enumerate(own) if token not in self._special]
        theirs = [token for token in other if token not in self._special]
        kept = max(1, math.ceil(keep * len(places)))
        added = min(int((1 - keep) * len(theirs)), len(theirs) - 1)  # together never longer than the longer text
        if added < 1 or not places:
            return own, self._target(label).tolist()
        mixed = [*own[: places[kept - 1] + 1], *theirs[-added:], *own[places[-1] + 1 :]]
        share = kept / (kept + added)
        return mixed, (share * self._target(label) + (1 - share) * self._target(partner["label"])).tolist()

    def _target(self, label: Any) -> npt.NDArray[np.float64]:
        return np.eye(self._classes)[label] if self._classes else np.asarray(label, np.float64)


def _wordings(file: Path, tokenizer: Any, *, steps: Sequence[Normalisation], length: int) -> dict[Tokens, list[Tokens]]:
    """Texts as tokens, with their other wordings."""
    pairs = [of_row(row, ("text", "paraphrase"), number) for number, row in enumerate(read_rows(file), start=1)]
    texts = [normalise(text, steps) for pair in pairs for text in pair]
    rows = list(map(tuple, encode(texts, tokenizer, length)["input_ids"]))
    found: dict[Tokens, list[Tokens]] = {}
    for text, other in zip(rows[::2], rows[1::2], strict=True):
        if other != text:
            found.setdefault(text, []).append(other)
    if not found:
        raise DataError(f"--augment.paraphrases {file} has no text in other words", "Give another file.")
    return found


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
    config: TextAugmentConfig,
    tokenizer: Any,
    rows: Dataset,
    *,
    seed: int,
    limits: Mapping[str, int | None],
    classes: int = 0,
    steps: Sequence[Normalisation] = (),
    pairs: bool = False,
) -> dict[str, Any]:
    """What varies training texts, as the options `augment` and `mixup` of their task; none where nothing is to be done.

    Args:
        config: how often, and by what.
        tokenizer: of the texts.
        rows: of the training data.
        seed: of the run.
        limits: from `input_limits`.
        classes: there are; 0 where labels are numbers, or several for each text.
        steps: how the run brings texts into one form.
        pairs: the texts are pairs, whose tokens must stay on their side.

    Raises:
        ConfigError, DataError: as `TextAugmentation`; and where pairs were to be varied.
    """
    if config == TextAugmentConfig():
        return {}
    if pairs:
        raise ConfigError("--augment has no effect on pairs of texts", "Leave it out, or --data.text_pair.")
    vary = TextAugmentation(config, tokenizer, seed=seed, longest=limits["positions"], steps=steps)
    vary.check_rows(rows)
    if not config.mixup:
        return {"augment": vary}
    special = tokenizer.all_special_ids
    mixup = TextMixup(config.mixup, rows, classes=classes, special=special, seed=seed, vary=vary)
    return {"augment": vary, "mixup": mixup}
