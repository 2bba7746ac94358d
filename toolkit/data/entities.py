"""Names in a sequence of tokens: from tags of any of the usual schemes to spans, and from spans to tags."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from toolkit.data.contents import DENSE

Entity = tuple[int, int, str]
"""First token, the token behind the last one, and the type."""
OUTSIDE = "O"

_TAG = re.compile(r"([BIESLU])-(\S+)")
_TOKEN = re.compile(rf"[{DENSE}]|[^\W{DENSE}]+(?:[-./&][^\W{DENSE}]+)*|[^\w\s]")
_ENDS_DENSE, _BEGINS_DENSE = re.compile(rf"[{DENSE}]$"), re.compile(rf"^[{DENSE}]")


def is_tag(tag: str) -> bool:
    """Whether a tag says that its token is in no name, or of which type and where in it."""
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def entities(tags: Iterable[str]) -> list[Entity]:
    """The names that tags mark, in their order, by the rules of conlleval (Tjong Kim Sang and Buchholz 2000).

    The same rules read BIO, IOB1 (a name begins with I, and with B only where it follows one of its type at once),
    BIOES and BILOU: B, S and U begin a name, E, L, S and U end one, a name is of one type, and I goes on where it can.
    """
    found: list[Entity] = []
    begin, kind = 0, ""  # of the name that goes on, or no type
    at = -1
    for at, tag in enumerate(tags):
        place, _, of = tag.partition("-")
        if kind and (place in "BSUO" or of != kind):
            found.append((begin, at, kind))
            kind = ""
        if place != OUTSIDE and not kind:
            begin, kind = at, of
        if place in "ESLU" and kind:
            found.append((begin, at + 1, kind))
            kind = ""
    if kind:
        found.append((begin, at + 1, kind))
    return found


def bio(found: Iterable[Entity], length: int) -> list[str]:
    """So many tags, B and I of each name and O elsewhere."""
    tags = [OUTSIDE] * length
    for begin, end, kind in found:
        tags[begin] = f"B-{kind}"
        tags[begin + 1 : end] = [f"I-{kind}"] * (end - begin - 1)
    return tags


def labels_of(kinds: Iterable[str]) -> tuple[str, ...]:
    """The tags that there are for names of some types, `O` first."""
    return (OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI"))


def tokens_in(text: str) -> list[tuple[int, int]]:
    """Where the tokens of a running text begin and end: words, marks, and of scripts without blanks the characters."""
    return [match.span() for match in _TOKEN.finditer(text)]


def blanks_before(tokens: Sequence[str]) -> list[bool]:
    """Whether a blank would stand before each of the tokens in a running text: not beside a character of a script
    without blanks."""
    pairs = itertools.pairwise(tokens)
    return [False, *(not (_ENDS_DENSE.search(left) or _BEGINS_DENSE.search(right)) for left, right in pairs)]
