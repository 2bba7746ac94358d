"""An extension whose compilation was killed is compiled by the next run, which does not wait for the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.recipes.launching import ROOT

Compile = Callable[[str], "subprocess.Popen[str]"]

CODE = """
import sys, torch
from toolkit.strategies.deepspeed_library import import_deepspeed

import_deepspeed(torch.device("cpu"))
from torch.utils.cpp_extension import load

source, folder = sys.argv[1:]
load("answer", [source], extra_cflags=["-shared"], build_directory=folder, is_python_module=False)
print("loaded")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "extension"
    path.mkdir()
    return path


@pytest.fixture
def compile_with(source: Path, folder: Path) -> Iterator[Compile]:
    started = []

    def start(compiler: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(source), str(folder)],
            env=os.environ | {"CXX": compiler},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def slow_compiler(folder: Path) -> tuple[str, Path]:
    """A compiler that never ends, and the file that it makes at its start."""
    started = folder / "started"
    script = folder / "slow-c++"
    script.write_text(f'#!/bin/sh\ncase "$*" in *answer.cpp*) touch {started}; exec sleep 600;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script), started


def test_one_that_was_killed_while_compiling_holds_nobody_up(tmp_path: Path, compile_with: Compile) -> None:
    compiler, started = slow_compiler(tmp_path)
    first = compile_with(compiler)
    while not started.exists():
        assert first.poll() is None
        time.sleep(0.1)
    second = compile_with("c++")
    with pytest.raises(subprocess.TimeoutExpired):
        second.communicate(timeout=20)  # it waits for the turn
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "loaded" in printed


def test_what_torch_left_behind_holds_nobody_up(folder: Path, compile_with: Compile) -> None:
    (folder / "lock").touch()
    printed, _ = compile_with("c++").communicate(timeout=60)
    assert "loaded" in printed
    assert (folder / "lock").exists()  # it may be another program's, at work
