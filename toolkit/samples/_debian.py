"""Packages of Debian, for data that ship in no Python package: fetched by apt-get, unpacked without dpkg."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from toolkit.errors import DataError

_MAGIC, _HEADER = b"!<arch>\n", 60


def download(package: str, version: str, folder: Path) -> str:
    """Let apt-get, which knows the mirrors and keys of this machine, put a package's file into `folder`.

    Returns:
        Why it could not; empty where it did.
    """
    if shutil.which("apt-get") is None:
        return "this machine has no apt-get"
    command = ["apt-get", "download", "--quiet", "--quiet", f"{package}={version}"]
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode == 0:
        return ""
    last = [line for line in done.stderr.splitlines() if line.strip()][-4:]
    return "the last that apt-get said:\n    " + "\n    ".join(last)


def contents(archive: Path) -> tarfile.TarFile:
    """What a .deb installs, to be closed: the member `data.tar.*` of an archive of ar (the manual's page deb(5)).

    Raises:
        DataError: it is no such file, or is compressed in a way that Python cannot read.
    """
    try:
        with archive.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise tarfile.ReadError("it does not begin as one")
            while header := file.read(_HEADER):
                size = int(header[48:58])
                if header.startswith(b"data.tar"):
                    return tarfile.open(fileobj=io.BytesIO(file.read(size)))
                file.seek(size + size % 2, io.SEEK_CUR)  # members begin at even places
        raise tarfile.ReadError("it has no member data.tar")
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{archive} is no Debian package: {error}", "Fetch it again.") from error
