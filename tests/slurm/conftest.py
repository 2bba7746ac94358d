"""One cluster for all tests of this folder; where there can be none, they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.conftest import reference, texts_csv, tiny_job, tiny_model
from tests.slurm.cluster import Cluster, Missing, install

__all__ = ["reference", "texts_csv", "tiny_job", "tiny_model"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        install()
    except Missing as why:
        pytest.skip(str(why))
    with Cluster(nodes=3) as running:
        yield running
