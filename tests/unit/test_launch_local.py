"""`python -m launch local`: what it amounts to, what it refuses, and real starts."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.local import gpus_here
from tests.recipes.launching import environment
from tests.unit.test_launch_run import ENDS, ROOT, STOPS


def local(folder: Path, script: str, *words: str) -> subprocess.Popen[str]:
    """A start of a script that ends as its words say, with its standard input open."""
    (folder / "script.py").write_text(textwrap.dedent(script), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "local", str(folder / "script.py"), *words],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_it_says_is_what_one_would_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lines run in a shell, up to the last, and give the file that it starts with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options = ["--processes", "2", "--cpu", "--strategy", "zero3", "--dry-run", "--", "--run.name", "it's new"]
    assert main(["local", "recipes/bert_cls.py", *options]) == 0
    heading, export, config, launch = capsys.readouterr().err.splitlines()[:4]
    assert heading == "launch: this amounts to"
    assert export.strip() == "export ACCELERATE_USE_CPU=true"
    assert launch.startswith("  accelerate launch --config_file accelerate.yaml --num_cpu_threads_per_process ")
    assert launch.endswith(""" recipes/bert_cls.py --run.name 'it'"'"'s new'""")
    written = config.replace("python", sys.executable, 1)
    subprocess.run(["bash", "-ec", written], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    said = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    assert (said["num_processes"], said["use_cpu"], said["distributed_type"]) == (2, True, "DEEPSPEED")


def test_gpus_that_a_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, number in (("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-1a,GPU-2b,", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert gpus_here() == number


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("recipes/none.py", "there is no recipe recipes/none.py"),
        ("recipes/bert_cls.py --processes 0", "0 processes cannot be spread"),
        ("recipes/bert_cls.py --strategy fsdp --cpu", "fsdp needs at least two processes"),
        ("recipes/bert_cls.py --processes 3", "3 processes, but this machine has 2 GPUs"),
        ("recipes/bert_cls.py --cpu --nodes 2 --rank 1", "several nodes need the address of the first one"),
        ("recipes/bert_cls.py --cpu --nodes 2 --rank 2 --address a", "--rank 2 is not one of 2 nodes"),
        ("recipes/bert_cls.py --restarts -1", "--restarts is at least 0"),
    ],
)
def test_what_cannot_start(
    words: str, fact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert main(["local", *words.split(), "--dry-run"]) == 2
    assert fact in capsys.readouterr().err


def test_the_exit_code_is_the_recipes(tmp_path: Path) -> None:
    process = local(tmp_path, ENDS, "--processes", "2", "--cpu", "--resumable-code", "143", "--", "75", "75")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert "accelerate launch --config_file" in err


@pytest.mark.slow
def test_what_the_doctor_finds_is_not_started(tmp_path: Path) -> None:
    """The script is no recipe, which it says; and a signal ends the looking at once."""
    process = local(tmp_path, ENDS, "--cpu", "--doctor", "--restarts", "3", "--", "0")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert "launch: nothing was started" in err
    assert "✗ recipe" in out
    looked_at = len(list(tmp_path.glob("pid_*")))
    assert looked_at == 1, "it was imported, and not started"
    process = local(tmp_path, ENDS, "--cpu", "--doctor", "--obey", "--", "0")
    time.sleep(2)
    out, err = process.communicate("SIGTERM\n", timeout=30)
    assert process.returncode == 75, out + err
    assert len(list(tmp_path.glob("pid_*"))) <= looked_at + 1


@pytest.mark.slow
@pytest.mark.parametrize("said", ["SIGUSR1\n", ""])
def test_it_obeys_its_standard_input_and_the_end_of_it(tmp_path: Path, said: str) -> None:
    process = local(tmp_path, STOPS, "--processes", "2", "--cpu", "--obey", "--", "0.2")
    assert process.stdin is not None
    while len(list(tmp_path.glob("ready_*"))) < 2:
        assert process.poll() is None
    if said:
        process.stdin.write(said)
        process.stdin.flush()
    else:
        process.stdin.close()
        process.stdin = None
    assert process.wait(timeout=120) == 75
    process.communicate()
    assert [file.read_text() for file in sorted(tmp_path.glob("saved_*"))] == [said.strip() or "SIGTERM"] * 2
