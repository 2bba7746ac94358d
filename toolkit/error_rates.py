"""Word and character error rates: how far what was heard is from what was said."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from toolkit.requirements import optional

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u30ff\u31f0-\u31ff"  # kana
    "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Scripts that are written without spaces: a word is a character there."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """What is compared of a text: its words in lower case without punctuation, in Chinese its characters.

    In full: NFKC, case folded; apostrophes vanish, all other punctuation and symbols are spaces.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = ("" if letter in "'’‘ʼ" else " " if unicodedata.category(letter)[0] in "PSC" else letter for letter in text)
    return _WORD.findall("".join(kept))


def errors(references: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> int:
    """Substitutions, deletions and insertions that make the references of what was found: the fewest of each pair."""
    jiwer = optional("jiwer", "the word error rate", "audio")
    # jiwer counts words between spaces: what has spaces in it is given without them.
    pairs = [
        (" ".join(map(_closed, said)), " ".join(map(_closed, heard)))
        for said, heard in zip(references, found, strict=True)
    ]
    if not pairs:
        return 0
    output = jiwer.process_words([said for said, _ in pairs], [heard for _, heard in pairs])
    return int(output.substitutions + output.deletions + output.insertions)


def _closed(word: str) -> str:
    return word.replace(" ", "\u2423")


def error_counts(references: Sequence[str], found: Sequence[str]) -> dict[str, int]:
    """Errors and numbers of words and characters, which add up over texts.

    Characters are those of the compared words, with one space between two of them, but none beside one of a script that
    has none.
    """
    said, heard = ([words_of(text) for text in texts] for texts in (references, found))
    letters, heard_letters = ([list(_joined(words)) for words in texts] for texts in (said, heard))
    return {
        "word_errors": errors(said, heard),
        "words": sum(map(len, said)),
        "character_errors": errors(letters, heard_letters),
        "characters": sum(map(len, letters)),
    }


def _joined(words: Sequence[str]) -> str:
    return re.sub(rf"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])", "", " ".join(words))
