"""The data and the model of the recipes' tests; and what whole runs import late, for their ranks to find ready."""

from __future__ import annotations

from tests import ranks
from tests.recipes.conftest import texts_csv, tiny_job, tiny_model

__all__ = ["texts_csv", "tiny_job", "tiny_model"]

ranks.PRELOAD += ["pytest", "toolkit.report.html", "tests.faults.trapped"]

# Not finished: they are written, but have not been seen to pass as a whole on a machine of their own.
collect_ignore = [
    *("test_hangs.py", "test_signals.py", "test_security.py", "test_resume.py", "test_elastic.py"),
    *("test_divergence.py", "test_kills_while_saving.py"),
]
