"""A SLURM cluster of several nodes on this machine, with SLURM's own daemons: see `nodes.sh`.

What it is not: nothing limits a job's memory or cores, all nodes see the same files (but for `/dev/shm`), there is no
accounting, and GPUs are pretended: SLURM hands out their numbers.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HEAD = Path(__file__).with_name("nodes.sh")
NETWORK = "10.213.9"

CONF = """\
ClusterName=tests
SlurmctldHost=head({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a job that is queued again waits, too; the default is 120 s.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Of the lines below, not of the hardware.
SlurmdParameters=config_overrides
# A node that is silent for so long is down, which is noticed within twice the time.
SlurmdTimeout=8
MessageTimeout=5
TCPTimeout=2
KillWait=5
# So long it speaks of jobs that have ended.
MinJobAge=3600
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Missing(Exception):
    """Why there can be no cluster here."""


def install() -> None:
    """Install SLURM where that is possible.

    Raises:
        Missing: it is not.
    """
    if os.geteuid() != 0:
        raise Missing("a cluster needs root, for namespaces and for SLURM's packages")
    done = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"namespaces are not allowed here: {done.stderr.strip()}")
    path = f"{os.environ['PATH']}:{SBIN}"
    if all(shutil.which(program, path=path) for program in PROGRAMS):
        return
    if not shutil.which("apt-get"):
        raise Missing("SLURM is not installed, and there is no apt-get")
    get = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    subprocess.run([*get, "update"], capture_output=True, timeout=300)
    install = [*get, "install", "-y", "--no-install-recommends", *PACKAGES]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(install, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise Missing(f"SLURM cannot be installed: {done.stderr.strip()[-300:]}")


class Cluster:
    """Nodes `node1` … that run jobs as soon as this is made; a context, at whose end all of it is gone.

    Attributes:
        folder: of its files; `folder / "log"` holds the daemons' own words.
        bin: sbatch and its kin, to be put first in the path: they work as on a login node.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, gpus: int = 2) -> None:
        # Sockets have short paths.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.bin = self.folder / "bin"
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._write_files(cpus, gpus)
        own = {"CLUSTER": str(self.folder), "NETWORK": NETWORK, "NODES": " ".join(self.nodes)}
        environment = {"PATH": SBIN, "HOME": "/root", "LANG": "C.UTF-8", "SLURM_CONF": str(self.folder / "slurm.conf")}
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child"]
        with (self.folder / "log" / "head.out").open("w") as out:
            self._head = subprocess.Popen(
                ["unshare", *namespaces, "bash", str(HEAD), "head"],
                env=environment | own,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._write_clients()
        self.until(lambda: self.idle() == nodes, 40, "the nodes to be idle")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *of_an_error: object) -> None:
        self._head.kill()  # and the kernel all that runs in its namespaces
        self._head.wait()
        for _ in range(50):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    def environment(self) -> dict[str, str]:
        """For commands that are to find the clients."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return outer | {"PATH": f"{self.bin}:{outer['PATH']}"}

    def call(self, *command: str, check: bool = True) -> str:
        """What a client prints."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def on(self, node: str, *command: str) -> str:
        """Run a command on a node, outside of any job."""
        target = ["nsenter", "--target", str(self._pid(node)), "--net", "--uts", "--ipc", "--mount", "--pid"]
        return subprocess.run([*target, "--", *command], capture_output=True, text=True, timeout=30).stdout

    def idle(self) -> int:
        """How many nodes could take a job now."""
        return len(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def state(self, job: str) -> str:
        """The state of a job, as RUNNING."""
        match = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job, check=False))
        return match[1] if match else "UNKNOWN"

    def power_off(self, node: str) -> None:
        """All that runs on it dies at once."""
        self._request(f"power-off {node}")

    def power_on(self, node: str) -> None:
        """Start it again; wait until it can take jobs."""
        self._request(f"power-on {node}")
        usable = ("idle", "mixed", "allocated")
        self.until(lambda: self.call("sinfo", "-h", "-n", node, "-o", "%T").strip() in usable, 60, f"{node} to be back")

    def freeze(self, node: str) -> None:
        """Stop all of its processes: it no longer answers."""
        self.on(node, "bash", "-c", "kill -STOP -1")

    def thaw(self, node: str) -> None:
        """Let its processes go on, but for SLURM's own, which would end those of jobs that it has given up."""
        self.on(node, "bash", "-c", "pkill -KILL -x 'slurmd|slurmstepd|srun'; kill -CONT -1")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """A time in which slurmctld does not run."""
        self._request("stop-controller")
        self.until(lambda: not (self.folder / "slurmctld.pid").exists(), 20, "slurmctld to stop")
        yield
        self._request("start-controller")
        self.until(lambda: self.call("sinfo", "-h", check=False) != "", 30, "slurmctld to be back")

    def until(self, fact: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for a fact; that it does not become one in time is an error."""
        deadline = time.monotonic() + seconds
        while not fact():
            if time.monotonic() > deadline or self._head.poll() is not None:
                logs = [f"{log.name}: {log.read_text()[-1500:]}" for log in (self.folder / "log").iterdir()]
                raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n" + "\n".join(logs))
            time.sleep(0.1)

    def _request(self, request: str) -> None:
        (self.folder / "requests").write_text(f"{request}\n")

    def _pid(self, node: str) -> int:
        """Process 1 of a node, as it is numbered out here: its own number is 1, and the head's is in a file."""
        inner = (self.folder / f"{node}.pid").read_text().strip()
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                numbers = re.search(r"^NSpid:\t(.*)$", status.read_text(), re.MULTILINE)
                if numbers and numbers[1].split()[-2:] == [inner, "1"] and self._mine(status.parent):
                    return int(status.parent.name)
        raise AssertionError(f"{node} does not run")

    def _mine(self, process: Path) -> bool:
        return f"CLUSTER={self.folder}".encode() in (process / "environ").read_bytes().split(b"\0")

    def _write_files(self, cpus: int, gpus: int) -> None:
        for name in ("bin", "log", "munge", "state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        (self.folder / "munge" / "key").touch(mode=0o600)
        (self.folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
        os.mkfifo(self.folder / "requests", 0o600)
        addresses = {node: f"{NETWORK}.{10 + number}" for number, node in enumerate(self.nodes, 1)}
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 head", *(f"{ip} {node}" for node, ip in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        lines = [
            f"NodeName={node} NodeAddr={ip} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN"
            for node, ip in addresses.items()
        ]
        conf = CONF.format(network=NETWORK, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(conf)
        # Left to choose, slurmd loads a plug-in that wants systemd; this one does nothing until it is asked.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(gpus):
            (self.folder / f"gpu{number}").touch()
        devices = f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={self.folder}/gpu[0-{gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)

    def _write_clients(self) -> None:
        """Commands that enter the head's network; within a job they are on a node already."""
        self.until(lambda: self._children(), 20, "the head")
        head = self._children()[0]
        for name in CLIENTS:
            path = self.bin / name
            path.write_text(
                f"#!/bin/sh\nexport SLURM_CONF={self.folder}/slurm.conf\n"
                f'[ -z "$SLURM_JOB_ID" ] || exec /usr/bin/{name} "$@"\n'
                f'exec nsenter --target {head} --net --uts -- /usr/bin/{name} "$@"\n'
            )
            path.chmod(0o755)

    def _children(self) -> list[int]:
        text = Path(f"/proc/{self._head.pid}/task/{self._head.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


def end_with(process: subprocess.Popen[str]) -> None:
    """End a process that a test has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
