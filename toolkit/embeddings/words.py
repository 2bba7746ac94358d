"""Words: how they are written in vocabularies, how texts are cut into them, and which are alike."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PADDING, UNKNOWN = "[PAD]", "[UNK]"
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""Kana and Chinese characters: scripts that are written without spaces."""
CHARACTER = re.compile(f"[{_SPACELESS}]")
_PARTS = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


def fold(word: str) -> str:
    """The word without case and width: what folds to the same is alike."""
    return unicodedata.normalize("NFKC", word).casefold()


def parts(word: str) -> list[str]:
    """What a word consists of where nothing else is known: its Chinese characters, and what hyphens and the like join.

    Nothing where that is the whole word.
    """
    found = _PARTS.findall(word)
    return [] if found == [word] else found


@dataclass(frozen=True)
class Piece:
    """A token as it stands in texts.

    Attributes:
        text: without the marks of its tokenizer; empty where it stands for nothing that is written.
        begins: whether a word begins with it.
    """

    text: str
    begins: bool = True


def pieces_of(tokenizer: Any) -> list[Piece]:
    """Every token of a fast tokenizer, by its id.

    Known are the marks of WordPiece (`##ing` within a word), of SentencePiece (`▁word` at a beginning) and of
    byte-level BPE (`Ġword`); where a vocabulary has none of them, every token is a word. Special tokens, gaps and
    single bytes of characters are empty.
    """
    names: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    marks = {mark: sum(name.startswith(mark) for name in names) for mark in ("##", "▁", "Ġ")}
    mark = max(marks, key=lambda key: marks[key])
    if marks[mark] < max(2, len(names) // 1000):
        mark = ""
    found = [Piece("")] * (max(names.values()) + 1)
    for name, number in names.items():
        if name not in special:
            found[number] = _piece(name, mark, tokenizer)
    return found


def _piece(name: str, mark: str, tokenizer: Any) -> Piece:
    if mark == "Ġ":
        text = tokenizer.convert_tokens_to_string([name])
        return Piece("" if "\ufffd" in text else text.strip(), text.startswith(" "))
    if mark == "##":
        return Piece(name.removeprefix(mark), not name.startswith(mark))
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return Piece("")
    return Piece(name.removeprefix(mark), not mark or name.startswith(mark))


def normalizer(lowercase: bool) -> Any:
    """NFKC (which makes full-width letters half-width), and lower case if wanted."""
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    return normalizers.Sequence(steps)


def word_tokenizer(words: Mapping[str, int], lowercase: bool) -> Any:
    """A fast tokenizer of transformers whose tokens are these words, in their order, behind padding and unknown.

    Chinese, which has no spaces, is cut into the words that are together the most probable by their counts (a unigram
    model, Kudo 2018, section 3.2); a vocabulary without such characters takes what stands between spaces and
    punctuation.

    Args:
        words: with their counts, 1 or more each.
        lowercase: whether texts are lower-cased first.
    """
    names = [*(name for name in (PADDING, UNKNOWN) if name not in words), *words]
    if any(CHARACTER.search(word) for word in words):
        total = sum(words.values())
        least = math.log(1 / total)
        scores = [(name, math.log(words[name] / total) if name in words else least) for name in names]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=names.index(UNKNOWN), byte_fallback=False))
    else:
        tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer(lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, unk_token=UNKNOWN)


def words_in(text: str, lowercase: bool, characters: bool) -> Sequence[str]:
    """What stands between spaces and punctuation, and that itself; with `characters`, each Chinese one is a word."""
    normal = normalizer(lowercase).normalize_str(text)
    found = [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(normal)]
    if not characters:
        return found
    cut = re.compile(rf"[{_SPACELESS}]|[^{_SPACELESS}]+")
    return [part for word in found for part in cut.findall(word)]
