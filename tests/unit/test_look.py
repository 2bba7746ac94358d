"""A look finds what is prepared, prepares nothing, and ends where a model would be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from toolkit.data.prepared import prepared
from toolkit.look import NotPrepared, SeenEnough, looking
from toolkit.sharing import once_a_node


def find(name: str) -> str:
    def load(folder: Path) -> str | None:
        return (folder / "text").read_text() if (folder / "text").exists() else None

    return prepared(name, load, lambda folder, scratch: (folder / "text").write_text("made") and None)


def test_nothing_is_prepared_by_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    with looking() as seen, pytest.raises(NotPrepared, match="^abc$"):
        find("abc")
    assert seen == []
    assert list(tmp_path.iterdir()) == []
    assert find("abc") == "made"
    with looking() as seen:
        assert find("abc") == "made"
        with pytest.raises(NotPrepared):
            find("def")
    assert seen == ["abc"]
    assert find("def") == "made"


def test_no_model_is_loaded_by_a_look() -> None:
    with looking(), pytest.raises(SeenEnough):
        once_a_node("a model", lambda: pytest.fail("it was built"))
    assert isinstance(once_a_node("a model", lambda: nn.Linear(1, 1)), nn.Linear)
