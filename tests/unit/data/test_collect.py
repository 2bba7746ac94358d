"""Addresses and archives, with a real server and real archives."""

from __future__ import annotations

import functools
import hashlib
import http.server
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.config import TextDataConfig
from toolkit.data.collect import collected
from toolkit.data.sources import resolve
from toolkit.errors import DataError, ToolkitError


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    _Quiet.requests = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def write_rows(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 9), ("test", 3)):
        lines = [f"{split} text {row},{'ab'[row % 2]}" for row in range(rows)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")


def test_an_address_is_fetched_once(served: tuple[Path, str]) -> None:
    folder, address = served
    write_rows(folder)
    content = (folder / "train.csv").read_bytes()
    name = f"{address}/train.csv#sha256={hashlib.sha256(content).hexdigest()}"
    found = Path(collected(name))
    assert found.name == "train.csv"
    assert found.read_bytes() == content
    (folder / "train.csv").write_text("other")
    assert collected(name) == str(found)
    assert _Quiet.requests == 1


def test_an_address_without_a_checksum_is_told_what_it_is(served: tuple[Path, str]) -> None:
    folder, address = served
    write_rows(folder)
    with pytest.raises(DataError, match="has no checksum") as caught:
        collected(f"{address}/train.csv")
    name = caught.value.remedy.split("name it as ")[1]
    assert Path(collected(name)).read_bytes() == (folder / "train.csv").read_bytes()


def test_what_is_not_what_was_meant(served: tuple[Path, str]) -> None:
    folder, address = served
    write_rows(folder)
    with pytest.raises(DataError, match="is not the file that was meant: its SHA-256 is"):
        collected(f"{address}/train.csv#sha256={'0' * 64}")
    with pytest.raises(DataError, match="cannot be fetched: File not found"):
        collected(f"{address}/nothing.csv#sha256={'0' * 64}")
    with pytest.raises(DataError, match="cannot be fetched"):
        collected(f"http://127.0.0.1:9/train.csv#sha256={'0' * 64}")
    with pytest.raises(DataError, match="is no address of a file"):
        collected(f"{address}/train.csv#sha512=0")


def pack(folder: Path, archive: Path) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in sorted(folder.rglob("*")):
                packed.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:]}" if archive.suffix != ".tar" else "w") as packed:
            packed.add(folder, folder.name)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_an_archive_is_the_folder_in_it(served: tuple[Path, str], tmp_path: Path, ending: str) -> None:
    write_rows(tmp_path / "reviews")
    archive = tmp_path / f"reviews{ending}"
    pack(tmp_path / "reviews", archive)
    source = resolve(TextDataConfig(name=str(archive)))
    assert set(source.parts) == {"train", "test"}
    one = resolve(TextDataConfig(name=f"{archive}/reviews/train.csv"))
    assert [file.name for file in one.parts["train"].files] == ["train.csv"]
    some = resolve(TextDataConfig(name=f"{archive}/reviews/t*.csv"))
    assert len(some.parts["train"].files) == 2


def test_an_archive_by_its_address(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    write_rows(tmp_path / "reviews")
    pack(tmp_path / "reviews", folder / "reviews.zip")
    digest = hashlib.sha256((folder / "reviews.zip").read_bytes()).hexdigest()
    source = resolve(TextDataConfig(name=f"{address}/reviews.zip#sha256={digest}"))
    assert set(source.parts) == {"train", "test"}


def test_an_archive_that_would_write_elsewhere(served: tuple[Path, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as packed:
        packed.writestr("../../outside.csv", "text,label")
    with pytest.raises(ToolkitError, match="outside of its folder"):
        collected(str(tmp_path / "evil.zip"))
    (tmp_path / "content.csv").write_text("text,label")
    with tarfile.open(tmp_path / "evil.tar", "w") as packed:
        packed.add(tmp_path / "content.csv", "../../outside.csv")
    with pytest.raises(DataError, match="cannot be unpacked"):
        collected(str(tmp_path / "evil.tar"))
    assert not list(tmp_path.rglob("outside.csv"))


def test_a_damaged_archive(served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "half.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"half\.zip cannot be unpacked"):
        collected(str(tmp_path / "half.zip"))


def test_other_names_stay() -> None:
    for name in ("sample:bbc-news", "owner/name", "data.csv", "folder", "missing.zip"):
        assert collected(name) == name
