"""The tested ranges: the ones of this installation hold, and a package outside of them is named."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from toolkit.errors import LaunchError
from toolkit.requirements import PROJECT, check_versions


def installed(folder: Path, *requirements: str) -> None:
    """Put another installation of the project before this one, with these requirements."""
    information = folder / f"{PROJECT.replace('-', '_')}-9.9.dist-info"
    information.mkdir()
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {PROJECT}",
        "Version: 9.9",
        *(f"Requires-Dist: {r}" for r in requirements),
    ]
    (information / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_this_installation_is_within_the_tested_ranges() -> None:
    names = {Requirement(text).name for text in metadata.requires(PROJECT) or []}
    assert {"torch", "accelerate", "transformers", "deepspeed", "datasets", "tyro", "pydantic"} <= names
    check_versions()


def test_what_is_outside_is_named(site: Path) -> None:
    version = metadata.version("torch")
    installed(site, "torch>=99", "numpy>=1", "no-such-package>=2.5", "no-such-thing", "tyro<0.1")
    with pytest.raises(LaunchError) as caught:
        check_versions()
    assert caught.value.message == (
        f"installed packages are outside the tested range: torch {version} is not in >=99; no-such-package is missing "
        f"(needs >=2.5); no-such-thing is missing (needs any version); tyro {metadata.version('tyro')} is not in <0.1"
    )
    assert "pip install -c constraints.txt -e ." in caught.value.remedy


def test_local_and_pre_releases_count_as_their_version(site: Path) -> None:
    major, minor, *_ = metadata.version("torch").split(".")
    installed(site, f"torch>={major}.{minor},<{major}.{int(minor) + 1}")
    check_versions()


def test_extras_and_other_platforms_are_not_asked_for(site: Path) -> None:
    installed(site, 'no-such-package; extra == "test"', 'no-such-package; sys_platform == "elsewhere"')
    check_versions()


def test_source_tree_that_was_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.requires(PROJECT)
    check_versions()
