"""Links are as slow as they are said to be, what is counted was sent, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.scaling_net import INTERFACE, Network, unable

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
TINY = ["--steps", "14", "--timed", "2", "--width", "32", "--layers", "2", "--links", "100"]
needs_namespaces = pytest.mark.skipif(bool(unable()), reason=unable() or "able")

BYTES = 2_000_000
SENDER = f"""
import pathlib, socket, time
for _ in range(100):
    try:
        connection = socket.create_connection(("{Network.address(1)}", 5000))
        break
    except OSError:
        time.sleep(0.05)
counter = pathlib.Path("/sys/class/net/{INTERFACE}/statistics/tx_bytes")
before, began = int(counter.read_text()), time.monotonic()
connection.sendall(bytes({BYTES}))
connection.shutdown(socket.SHUT_WR)
assert connection.recv(1) == b"."
print(time.monotonic() - began, int(counter.read_text()) - before)
"""
RECEIVER = """
import socket
with socket.create_server(("", 5000)) as server:
    connection, _ = server.accept()
    while connection.recv(1 << 16):
        pass
    connection.sendall(b".")
"""


def namespaces() -> set[str]:
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in found.splitlines() if line.startswith("scaling-")}


def transfer(network: Network) -> tuple[float, int]:
    """Seconds, and bytes by the interface's counter."""
    with subprocess.Popen([*network.inside(1, 0), sys.executable, "-c", RECEIVER]) as receiver:
        sender = [*network.inside(0, 0), sys.executable, "-c", SENDER]
        done = subprocess.run(sender, capture_output=True, text=True, check=True, timeout=60)
        assert receiver.wait(timeout=10) == 0
    seconds, sent = done.stdout.split()
    return float(seconds), int(sent)


@needs_namespaces
def test_links_have_the_rate_that_is_asked_for() -> None:
    rate = 20_000_000
    with Network(2) as network:
        free, _ = transfer(network)
        network.shape(rate)
        held, sent = transfer(network)
        network.shape(None)
        free_again, _ = transfer(network)
    # A burst goes through at once; headers are sent too.
    assert 0.9 < held / (BYTES * 8 / rate) < 1.3
    assert max(free, free_again) < held / 3
    assert 1 <= sent / BYTES < 1.1


@needs_namespaces
def test_a_network_goes_with_its_context() -> None:
    before = namespaces()
    with Network(2):
        assert len(namespaces() - before) == 3
    assert namespaces() == before


@needs_namespaces
def test_a_network_that_fails_half_way_goes_too() -> None:
    before = namespaces()
    subprocess.run(["ip", "netns", "add", f"scaling-{os.getpid()}-1"], check=True)  # in the way of the second host
    try:
        with pytest.raises(SystemExit, match="File exists"), Network(2):
            pass
        assert namespaces() - before == {f"scaling-{os.getpid()}-1"}, "what another made stays"
    finally:
        subprocess.run(["ip", "netns", "del", f"scaling-{os.getpid()}-1"], check=True)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "scaling_job.py" in " ".join(process.cmdline())
    except psutil.Error:  # a command that has just ended
        return False


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, str(SCRIPT), "--ranks", "2", *TINY], stderr=subprocess.PIPE) as benchmark:
        ours = psutil.Process(benchmark.pid)
        deadline = time.monotonic() + 30
        while len(ranks := [child for child in ours.children() if is_rank(child)]) < 2:
            assert time.monotonic() < deadline
            assert benchmark.poll() is None
            time.sleep(0.05)
        made = {name for name in namespaces() if name.startswith(f"scaling-{benchmark.pid}-")}
        assert len(made) == 3
        benchmark.send_signal(number)
        time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            benchmark.send_signal(number)
        assert benchmark.wait(timeout=30) == 128 + number
    assert not made & namespaces()
    deadline = time.monotonic() + 5
    while any(is_rank(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_namespaces
@pytest.mark.slow
def test_what_is_measured(tmp_path: Path) -> None:
    lines = tmp_path / "result.jsonl"
    command = [sys.executable, str(SCRIPT), "--ranks", "2", "--strategies", "ddp", "ddp, bf16", "ddp, powersgd", "fsdp"]
    subprocess.run([*command, *TINY, "--json", str(lines)], check=True, timeout=200, capture_output=True)
    rows = {row["strategy"]: row for row in json.loads(lines.read_text())["rows"]}
    assert list(rows) == ["single", "ddp", "ddp, bf16", "ddp, powersgd", "fsdp"]
    for strategy, row in rows.items():
        if strategy == "single":
            assert row["bytes"] < 1000
            continue
        # gloo sums gradients on every rank where fsdp needs a share on each, which alone makes it 1.5.
        assert 1 < row["bytes"] / row["minimum"] < (1.6 if strategy == "fsdp" else 1.1), strategy
        assert row["seconds"]["100 Mbit/s"] > 0.8 * row["bytes"] * 8 / 100e6, strategy
    assert rows["ddp, bf16"]["bytes"] == pytest.approx(rows["ddp"]["bytes"] / 2, rel=0.05)
    assert rows["ddp, powersgd"]["bytes"] < rows["ddp"]["bytes"] / 6
    assert rows["fsdp"]["loss"] == pytest.approx(rows["ddp"]["loss"], rel=1e-5)
    assert rows["ddp, powersgd"]["loss"] != rows["ddp"]["loss"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a root that becomes a user")
def test_who_is_not_root_is_told_so() -> None:
    code = "import os\nfrom benchmarks.scaling import main\nos.seteuid(65534)\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "network namespaces need root: run this as root, for instance with sudo\n"
