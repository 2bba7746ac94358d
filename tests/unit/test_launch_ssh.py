"""`python -m launch ssh`: what goes over the line, who ends whom, and starts over a real sshd."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.ssh import Crew, read_hosts
from tests.ranks import free_port
from tests.recipes.launching import environment
from tests.unit.test_launch_run import ENDS, ROOT, STOPS, wait_until

LAUNCH = (sys.executable, "-m", "launch", "ssh")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
needs_sshd = pytest.mark.skipif(not SSHD, reason="sshd is not installed: apt-get install openssh-server")


def test_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nnode1  # the first\n\nme@node-2.local\n10.0.0.3\n")
    assert read_hosts(tmp_path / "hosts") == ["node1", "me@node-2.local", "10.0.0.3"]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "names no host"),
        ("-oProxyCommand=x", "is no host"),
        ("a b", "is no host"),
        ("node1;touch x", "is no host"),
        ("a\nb\na", "names a twice"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_hosts_file(tmp_path: Path, text: str | None, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    assert main(["ssh", str(tmp_path / "hosts"), "recipes/bert_cls.py", "--processes", "1", "--dry-run"]) == 2
    assert fact in capsys.readouterr().err


def test_every_word_arrives_as_it_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a real shell, as the far end has one; and no secret goes along."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 0")
    (tmp_path / "hosts").write_text("node1\nnode2\n")
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$NCCL_SOCKET_IFNAME" "$@"\n')
    script.chmod(0o755)
    odd = ["--data.name", 'it\'s; touch $HOME/x `y` "z"', ""]
    words = [str(tmp_path / "hosts"), "recipes/bert_cls.py", "--processes", "3", "--cpu", "--python", str(script)]
    assert main(["ssh", *words, "--dry-run", "--", *odd]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert not any("canary" in line for line in lines)
    commands = [shlex.split(line) for line in lines]
    assert [command[command.index("--") + 1] for command in commands] == ["node1", "node2"]
    found = [subprocess.run(["sh", "-c", c[-1]], capture_output=True, text=True, check=True).stdout for c in commands]
    start = found[1].split("\n")[:-1]
    assert "--doctor" in start
    assert start[:5] == ["eth 0", "-m", "launch", "local", "recipes/bert_cls.py"]
    assert start[-12:] == ["--nodes", "2", "--rank", "1", "--address", "node1", "--port", "29500", "--", *odd]


# Who ends whom: shells instead of ssh

WAITS = 'read name; echo "heard $name"; exit 75'


def crew(*scripts: str) -> int:
    with Crew(20.0) as held:
        return held.run({f"host{i}": ["bash", "-c", script] for i, script in enumerate(scripts)})


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("scripts", "code"),
    [
        (("exit 0", "exit 0"), 0),
        (("exit 0", "exit 2"), 2),
        ((WAITS, "exit 1"), 1),
        ((WAITS, "exit 75"), 75),
        ((WAITS, "exit 255"), 1),
        ((WAITS, "kill -9 $$"), 1),
        (("sleep 0.5", "exit 0"), 0),
    ],
)
def test_one_that_fails_ends_all(scripts: tuple[str, ...], code: int, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert crew(*scripts) == code
    assert time.monotonic() - began < 10, "it waits neither for the grace nor for ever"
    assert ("[host0] heard SIGTERM" in capfd.readouterr().out) == (scripts[0] == WAITS)


@pytest.mark.timeout(60)
def test_a_signal_reaches_all_and_a_second_one_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    with Crew(20.0) as held:
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        assert held.run({"a": ["bash", "-c", WAITS], "b": ["bash", "-c", WAITS]}) == 75
        assert held.asked == signal.SIGUSR1
    assert sorted(capfd.readouterr().out.splitlines()) == ["[a] heard SIGUSR1", "[b] heard SIGUSR1"]
    with Crew(20.0) as held:
        for seconds in (0.2, 2.6):
            threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()
        began = time.monotonic()
        assert held.run({"a": ["sleep", "60"]}) == 128 + signal.SIGINT
        assert time.monotonic() - began < 5


# A real sshd


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of an ssh by which `hosta` and `hostb` are this machine, over an sshd of its own."""
    folder, port = tmp_path_factory.mktemp("sshd"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    server = {
        **{"Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": "none", "UsePAM": "no"},
        **{"AuthorizedKeysFile": folder / "user.pub", "StrictModes": "no", "PermitRootLogin": "yes"},
    }
    (folder / "server").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
    known = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
    options = {"HostName": "127.0.0.1", "Port": port, "IdentityFile": folder / "user", **known}
    (folder / "client").write_text("Host hosta hostb\n" + "".join(f" {k} {v}\n" for k, v in options.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD
    with subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "server")], stderr=subprocess.PIPE) as process:
        try:
            test = ["ssh", "-F", str(folder / "client"), "-o", "BatchMode=yes", "hosta", "true"]
            wait_until(lambda: subprocess.run(test, capture_output=True, check=False).returncode == 0, 10)
            yield folder / "client"
        finally:
            process.terminate()


def over_ssh(folder: Path, client: Path, script: str, *words: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(textwrap.dedent(script), encoding="utf-8")
    (folder / "hosts").write_text("hosta\nhostb\n")
    own = ["--processes", "1", "--cpu", "--skip-doctor", "--address", "127.0.0.1", "--port", str(free_port())]
    return subprocess.Popen(
        [*LAUNCH, str(folder / "hosts"), str(folder / "script.py"), *own, "--ssh-config", str(client), "--", *words],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_sshd
@pytest.mark.parametrize(
    ("script", "words", "signalled", "code"),
    [
        pytest.param(STOPS, ("0.2",), signal.SIGTERM, 75, id="a signal"),
        pytest.param(ENDS, ("waits", "2"), 0, 2, id="one fails", marks=pytest.mark.slow),
        pytest.param(STOPS, ("0.2",), signal.SIGKILL, -9, id="killed", marks=pytest.mark.slow),
    ],
)
def test_over_a_real_sshd(
    tmp_path: Path, client: Path, script: str, words: tuple[str, ...], signalled: int, code: int
) -> None:
    process = over_ssh(tmp_path, client, script, *words)
    if signalled:
        wait_until(lambda: len(list(tmp_path.glob("ready_*"))) == 2 or process.poll() is not None, 120)
        process.send_signal(signalled)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    if signalled:  # also where nobody is left to pass anything on, the ranks save
        wait_until(lambda: len(list(tmp_path.glob("saved_*"))) == 2, 60)
        assert {file.read_text() for file in tmp_path.glob("saved_*")} <= {"SIGTERM", "the launcher has ended"}
    pids = [int(file.name.split("_")[2]) for file in tmp_path.glob("pid_*")]
    assert len(pids) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 90)
