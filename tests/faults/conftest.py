"""The data and the model of the recipes' tests; and what whole runs import late, for their ranks to find ready."""

from __future__ import annotations

from tests import ranks
from tests.recipes.conftest import texts_csv, tiny_job, tiny_model

__all__ = ["texts_csv", "tiny_job", "tiny_model"]

ranks.PRELOAD += ["pytest", "toolkit.report.html", "tests.faults.trapped"]
