"""Texts in one form."""

from __future__ import annotations

import pickle

import pytest

from toolkit.errors import ConfigError
from toolkit.normalise import check_normalisation, normalise, normalise_row

CASES = {
    "html": (
        "<p>Fish &amp; chips</p><script>if (a < b) alert()</script><ul><li>one</li></ul>",
        "\nFish & chips\n\n\none\n\n",
    ),
    "html without tags": ("2 > 1", "2 > 1"),
    "nfkc": ("ﬁne ① Ｗｏｒｌｄ ｱ", "fine 1 World ア"),
    "halfwidth": ("Ｗｏｒｌｄ！　① ｱ", "World! ① ｱ"),
    "control": ("a\u200bb\x00c\u202ed\te\r\nf\u200dg", "abcd\te\nf\u200dg"),
    "simplified": ("漢字轉換，臺灣", "汉字转换，台湾"),
    "traditional": ("汉字转换", "漢字轉換"),
    "spaces": ("  a \t b\u3000c \n\n\n\n d ", "a b c\n\nd"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step(name: str) -> None:
    given, wanted = CASES[name]
    assert normalise(given, (name.split()[0],)) == wanted  # type: ignore[arg-type]


def test_the_order_is_that_of_the_steps_and_not_of_the_wish() -> None:
    text = "<b>Ａ&#x200b;</b>  　b"
    assert normalise(text, ("spaces", "control", "halfwidth", "html")) == "A b"
    assert normalise(text, ()) == text


def test_rows_of_any_shape() -> None:
    row = {"messages": [{"role": "user", "content": "漢字"}], "number": 3, "漢": None}
    assert normalise_row(row, ("simplified",)) == {
        "messages": [{"role": "user", "content": "汉字"}],
        "number": 3,
        "漢": None,
    }


def test_twice_is_once() -> None:
    steps = ("html", "nfkc", "control", "simplified", "spaces")
    for text, _ in CASES.values():
        once = normalise(text, steps)  # type: ignore[arg-type]
        assert normalise(once, steps) == once  # type: ignore[arg-type]


def test_what_contradicts_itself() -> None:
    check_normalisation(("simplified", "html"))
    with pytest.raises(ConfigError, match="both simplified and traditional"):
        check_normalisation(("simplified", "traditional"))


def test_it_can_be_sent_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(normalise)) is normalise
