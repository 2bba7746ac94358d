"""What all tests share."""

from __future__ import annotations

import pytest

from tests import ranks


@pytest.fixture(scope="session", autouse=True)
def _rank_server() -> None:
    ranks.start_server()
