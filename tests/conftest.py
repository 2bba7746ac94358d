"""What all tests share."""

from __future__ import annotations

import signal

import pytest

from tests import ranks

# A shell that starts the tests in the background, or nohup, has these ignored, and all processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _rank_server() -> None:
    ranks.start_server()
