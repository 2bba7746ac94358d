"""The tested range of each dependency, from the installed project's own metadata; those that one setting needs."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from toolkit.errors import ConfigError, LaunchError

PROJECT = "largemodel-toolkit"


def check_versions() -> None:
    """Refuse to start beside a dependency outside the range that the tests cover.

    Raises:
        LaunchError: naming each package, the version found and the range.
    """
    try:
        requirements = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return  # run from a source tree that was not installed: there is no promise to check
    wrong = [line for text in requirements if (line := _outside(Requirement(text)))]
    if wrong:
        raise LaunchError(
            "installed packages are outside the tested range: " + "; ".join(wrong),
            "Install the tested versions: pip install -c constraints.txt -e .",
        )


def optional(name: str, key: str, extra: str) -> Any:
    """The module of a dependency that only one setting needs.

    Args:
        name: of the module.
        key: the setting, as `--data.languages`.
        extra: of this project, which installs it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{key} needs {name.split('.')[0]}, which is not installed",
            f"Install it with: pip install '{PROJECT}[{extra}]', or leave the setting out.",
        ) from error


def _outside(requirement: Requirement) -> str:
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return ""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing (needs {requirement.specifier or 'any version'})"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not in {requirement.specifier}"
