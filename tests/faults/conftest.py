"""The data and the model of the recipes' tests; and what whole runs import late, for their ranks to find ready."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.faults.jobs import Reference, finish
from tests.recipes.conftest import texts_csv, tiny_job, tiny_model

__all__ = ["texts_csv", "tiny_job", "tiny_model"]

ranks.PRELOAD += ["pytest", "toolkit.report.html", "tests.faults.trapped"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Uninterrupted runs, each made once."""
    made: dict[Any, Path] = {}

    def whole(options: Sequence[str], ranks: int = 1) -> Path:
        key = (tuple(options), ranks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            finish(options, made[key], ranks)
        return made[key]

    return whole
