"""`toolkit doctor` on several nodes, with everything that it looks for provoked: each is named, in time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.scaling_net import Network, unable
from tests.doctor.nodes import PORT, ROOT, Nodes, Seen, outcome

pytestmark = pytest.mark.skipif(bool(unable()), reason=unable() or "able")

# libfaketime would do, but its clock_nanosleep fails in Python's time.sleep.
ANOTHER_TIME = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *found) {
    int (*own)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = own(clock, found);
    if (!failed && clock == CLOCK_REALTIME) found->tv_sec += 3600;
    return failed;
}
"""
RECIPE = """
from dataclasses import dataclass
from toolkit.config import CheckpointConfig, RunConfig, StrategyConfig, TrainConfig

@dataclass(frozen=True)
class Config:
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

def main(config):
    pass
"""


@pytest.fixture
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    with Network(getattr(request, "param", 2)) as network:
        made = Nodes(network, tmp_path)
        made.prepare()
        (tmp_path / "recipe.py").write_text(RECIPE)
        yield made
        made.end()


def both(nodes: Nodes, *words: str) -> Seen:
    processes = [nodes.doctor(node, *words) for node in range(nodes.network.size)]
    seen = [outcome(process) for process in processes]
    assert len({one.code for one in seen}) == 1, "all end alike"
    assert all("node0 tells what was found" in one.err for one in seen[1:])
    assert seen[0].seconds < 60
    return seen[0]


def test_sound_nodes(nodes: Nodes) -> None:
    seen = both(nodes, "--", str(nodes.folder / "recipe.py"), "--run.dir", str(nodes.folder / "runs" / "one"))
    assert seen.errors == set(), seen.findings
    assert seen.code == 0
    assert seen.find("ok", "nodes") == [": all 2 are here, each with a rank of its own"]
    assert "is shared by all 2 nodes" in seen.find("ok", "run folder")[0]
    assert len(seen.find("ok", "settings")) == len(seen.find("ok", "code")) == len(seen.find("ok", "clock")) == 1
    link = seen.figures["links"]["0"]["1"]
    assert link["back"] == link["sent"] == 200
    assert 0 < link["rtt"] < 0.05
    assert seen.figures["gloo"]["0-1"]["bandwidth"] > 12.5e6
    assert not list(nodes.folder.rglob(".doctor-*")), "nothing is left behind"
    assert not (nodes.folder / "runs").exists(), "and no folder made"


@pytest.mark.skipif(not shutil.which("cc"), reason="a clock is shifted by a library, and there is no C compiler")
def test_what_differs_is_named(nodes: Nodes) -> None:
    """Clock, package, code, settings and run folder of one node are others."""
    folder, shared = nodes.folder, nodes.folder / "shared"
    shared.mkdir()
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "time.so"), "-ldl"]
    subprocess.run(compiler, input=ANOTHER_TIME, text=True, check=True)
    information = folder / "site" / "accelerate-9.9.9.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: accelerate\nVersion: 9.9.9\n")
    (folder / "order.py").write_text((ROOT / "toolkit" / "order.py").read_text() + "# changed\n")
    other = {
        "PYTHONPATH": f"{ROOT}:{folder / 'site'}",
        "LD_PRELOAD": str(folder / "time.so"),
    }
    # The path of the packages comes after PYTHONPATH, and the first metadata that is found counts.
    before = f"mount -t tmpfs tmpfs {shared}; mount --bind {folder}/order.py {ROOT}/toolkit/order.py"
    recipe = ["--", str(folder / "recipe.py"), "--run.dir", str(shared / "run")]
    first = nodes.doctor(0, *recipe)
    second = nodes.doctor(1, *recipe, "--train.global_batch", "64", environment=other, before=before)
    seen = outcome(first)
    assert outcome(second).code == seen.code == 1
    assert seen.seconds < 60
    (clock,) = seen.find("error", "clock")
    assert clock.startswith("node1: 3,600.")
    assert clock.endswith(" s ahead of that of node0")
    assert any(text.startswith("node1: accelerate 9.9.9, where node0 has ") for text in seen.find("error", "versions"))
    assert seen.find("error", "code") == ["node1: 1 files differ from those of node0: toolkit/order.py"]
    assert seen.find("error", "settings") == ["node1: other than on node0: train.global_batch is 64, there 32"]
    assert seen.find("error", "run folder") == [f"node1: {shared / 'run'} is not the folder of that name on node0"]
    assert seen.errors == {"clock", "versions", "code", "settings", "run folder"}


@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_a_node_that_does_not_come_is_named(nodes: Nodes) -> None:
    job = {"SLURM_JOB_NODELIST": "node[0-2]"}
    processes = [nodes.doctor(node, "--timeout", "20", environment=job) for node in range(2)]
    seen = outcome(processes[0])
    assert (seen.code, outcome(processes[1]).code) == (1, 1)
    assert seen.find("error", "nodes") == ["rank 2 (node2): rank 2 (node2) did not come: 2 of 3 nodes are here"]
    assert seen.errors == {"nodes"}
    assert seen.seconds < 20
    assert seen.figures["gloo"]["0-1"]["bandwidth"] > 0, "those that are here are measured all the same"


def test_a_port_that_is_taken(nodes: Nodes) -> None:
    """By somebody who answers every line that comes."""
    script = (
        f"import socket\nfor _ in iter(int, 1):\n with socket.create_server(('', {PORT})) as s:\n  print(flush=True)"
    )
    script += "\n  while True: c, _ = s.accept(); c.sendall(b'HTTP/1.1 400 Bad Request'); c.close()"
    squatter = nodes.start(0, sys.executable, "-c", script)
    assert squatter.stdout is not None
    squatter.stdout.readline()
    processes = [nodes.doctor(node, "--timeout", "15") for node in (0, 1)]
    first, second = map(outcome, processes)
    assert first.code == second.code == 1
    (taken,) = first.find("error", "port")
    assert taken.startswith(f"node0: {PORT} is taken by python")
    assert f"(process {squatter.pid})" in taken
    (met,) = second.find("error", "rendezvous")
    assert "something else than a doctor answers there" in met
    assert max(first.seconds, second.seconds) < 15


def test_names_that_do_not_resolve_or_lead_back(nodes: Nodes) -> None:
    (nodes.folder / "hosts").write_text("127.0.0.1 localhost node0\n")
    lost = nodes.start(1, *nodes_doctor("nowhere"))
    back = nodes.start(0, *nodes_doctor("node0"))
    lost_seen, back_seen = outcome(lost), outcome(back)
    assert lost_seen.find("error", "rendezvous") == ["node1: the name nowhere does not resolve"]
    assert lost_seen.find("error", "host name") == ["node1: node1 does not resolve"]
    assert back_seen.find("error", "rendezvous") == [
        "node0: node0 is loopback (127.0.0.1): each node would wait for itself"
    ]
    assert "127.0.0.1 alone, which is loopback" in back_seen.find("error", "host name")[0]
    assert lost_seen.code == back_seen.code == 1


def nodes_doctor(host: str) -> list[str]:
    rank = "1" if host == "nowhere" else "0"
    words = ["--json", "--nodes", "2", "--rank", rank, "--rendezvous", f"{host}:{PORT}", "--timeout", "15"]
    return [sys.executable, "-m", "toolkit.cli", "doctor", *words]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_a_bad_wire_is_named(nodes: Nodes) -> None:
    """5 % loss and 100 ms each way between one node and the bridge; and of two nodes, which have no others beside."""
    with nodes.bad_wire(1, delay=0.1, loss=0.05):
        seen = both(nodes)
    (loss,) = seen.find("error", "loss")
    assert loss.startswith("node1 (all its 2 links): ")
    assert 0.03 < float(loss.split()[5].rstrip("%")) / 100 < 0.08
    (late,) = seen.find("warning", "latency")
    assert late.startswith("node1 (all its 2 links): a packet there and back takes 20")
    assert "the median of the others is 0." in late
    told = seen.find("error", "gloo all-reduce") + seen.find("warning", "gloo all-reduce")
    assert told
    assert all("node1" in text.partition(":")[0] for text in told)
    assert "loss" in seen.errors <= {"loss", "gloo all-reduce"}


@pytest.mark.slow
def test_a_bad_wire_between_two(nodes: Nodes) -> None:
    with nodes.bad_wire(1, delay=0.1, loss=0.05):
        seen = both(nodes)
    assert seen.find("error", "loss")[0].startswith("node0 – node1: ")
    assert seen.find("warning", "latency")[0].startswith("node0 – node1: a packet there and back takes 20")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_a_dead_link_is_named(nodes: Nodes) -> None:
    away = f"ip route add blackhole {Network.address(2)}"
    processes = [nodes.doctor(node, before=away if node == 1 else "") for node in range(3)]
    seen = outcome(processes[0])
    (dead,) = seen.find("error", "reachable")
    assert dead.startswith("node1 – node2: no connection (")
    assert seen.errors == {"reachable"}
    assert set(seen.figures["gloo"]) == {"0-1", "0-2"}
    assert seen.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [3], indirect=True)
def test_a_slow_node_is_named(nodes: Nodes) -> None:
    """One whose cable runs at 50 Mbit/s."""
    space = nodes.network.space(2)
    limits = ("rate", "50mbit", "burst", "65536", "limit", "6000000")
    subprocess.run(["tc", "-n", space, "qdisc", "add", "dev", "eth0", "root", "tbf", *limits], check=True)
    seen = both(nodes)
    (slow,) = seen.find("warning", "gloo all-reduce")
    assert slow.startswith("node2 (all its 2 links): ")
    assert "Mbit/s, where the median of the others is" in slow
    assert seen.code == 0


@pytest.mark.slow
def test_data_that_are_prepared_on_one_node_alone(nodes: Nodes) -> None:
    """A real recipe, on texts that differ, and whose cache is each node's own."""
    rows = "".join(f"word{i} word{i % 7} more,{'ab'[i % 2]}\n" for i in range(60))
    options = ["--data.name", str(nodes.folder / "texts.csv"), "--data.max_length", "8"]
    recipe = ["--", "recipes/bert_cls.py", *options, "--run.dir", str(nodes.folder / "run")]
    (nodes.folder / "texts.csv").write_text("text,label\n" + rows)
    prepare = [sys.executable, "-m", "toolkit.cli", "data", "show", "recipes/bert_cls.py", *options]
    subprocess.run(prepare, check=True, capture_output=True, timeout=120, cwd=ROOT)
    seen = both(nodes, *recipe)
    assert seen.code == 0
    assert seen.find("ok", "data")[0].startswith(": prepared (fingerprint ")
    (nodes.folder / "others.csv").write_text("text,label\n" + rows.replace("word1 ", "other "))
    swap = f"mount --bind {nodes.folder}/others.csv {nodes.folder}/texts.csv"
    processes = [nodes.doctor(0, *recipe), nodes.doctor(1, *recipe, before=swap)]
    seen = outcome(processes[0])
    assert outcome(processes[1]).code == seen.code == 1
    assert seen.find("error", "data")[0].startswith("node1: other data than on node0 (fingerprint ")
