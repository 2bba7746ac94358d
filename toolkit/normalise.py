"""Texts brought into one form before they are compared, split and learnt from."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

from toolkit.errors import ConfigError
from toolkit.requirements import optional

if TYPE_CHECKING:  # the settings take a while to import, and mistakes are to be told before
    from toolkit.config import Normalisation

_ORDER: tuple[Normalisation, ...] = ("html", "nfkc", "halfwidth", "control", "simplified", "traditional", "spaces")
"""In which they are applied, in whatever order they are asked for: what one leaves, the next may have to mend."""
_CHINESE = {"simplified": "t2s", "traditional": "s2t"}
"""Names of OpenCC's tables: by characters, and by words where a character has several counterparts."""
_HALF = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: 0x20}
"""Full-width forms of ASCII, and the ideographic space."""
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
"""Controls but for tab and line ends; soft hyphens, spaces without width, and what turns the direction of text. What
joins letters (U+200C, U+200D) stays: Persian and emoji need it."""
_BLANKS, _LINES = re.compile(r"[^\S\n]+"), re.compile(r"\n{3,}")
_HIDDEN = frozenset({"script", "style", "template", "noscript"})
_BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p "  # noqa: SIM905
    "pre section table td th tr ul".split()
)


def check_normalisation(steps: Sequence[Normalisation]) -> None:
    """Refuse what contradicts itself or cannot be done here.

    Raises:
        ConfigError: both scripts of Chinese are asked for, or OpenCC is not installed.
    """
    scripts = [step for step in _CHINESE if step in steps]
    if len(scripts) > 1:
        raise ConfigError("--data.normalise has both simplified and traditional", "Choose one.")
    for script in scripts:
        _converter(script)


def normalise(text: str, steps: Sequence[Normalisation]) -> str:
    """A text in the form that was asked for."""
    for step in _ORDER:
        if step in steps:
            text = _STEPS[step](text) if step in _STEPS else _converter(step).convert(text)
    return text


def normalise_row(value: Any, steps: Sequence[Normalisation]) -> Any:
    """All texts in a row of any shape; names of columns stay."""
    if isinstance(value, str):
        return normalise(value, steps)
    if isinstance(value, dict):
        return {key: normalise_row(inner, steps) for key, inner in value.items()}
    return [normalise_row(inner, steps) for inner in value] if isinstance(value, list) else value


def _spaces(text: str) -> str:
    lines = (_BLANKS.sub(" ", line).strip() for line in text.splitlines())
    return _LINES.sub("\n\n", "\n".join(lines)).strip()


def _plain(markup: str) -> str:
    if "<" not in markup and "&" not in markup:
        return markup
    reader = _Words()
    reader.feed(markup)
    reader.close()
    return "".join(reader.words)


class _Words(HTMLParser):
    """The words between tags; where a block begins or ends, a line does."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in _HIDDEN
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN and self._hidden > 0
        if tag in _BLOCKS:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


_STEPS: dict[str, Callable[[str], str]] = {
    "html": _plain,
    "nfkc": functools.partial(unicodedata.normalize, "NFKC"),
    "halfwidth": lambda text: text.translate(_HALF),
    "control": lambda text: _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")),
    "spaces": _spaces,
}


@functools.cache
def _converter(script: str) -> Any:
    return optional("opencc", f"--data.normalise {script}", "clean").OpenCC(_CHINESE[script])
