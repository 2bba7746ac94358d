"""This machine: its name, its limits, its cores, its shared memory."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.doctor.findings import Finding, Severity, ok
from toolkit.environment import cores_of_this_process

RESOLVING_SECONDS = 5.0
_FEW_FILES, _FEW_PROCESSES = 4096, 1024
_LITTLE_SHARED_MEMORY = 1 << 30


@dataclass(frozen=True)
class Names:
    """What this machine is called, and the addresses under which its own name is found here."""

    name: str
    addresses: tuple[str, ...]


def own_names() -> Names:
    """By the system's resolver, which is asked for a few seconds at most."""
    name = socket.gethostname()
    return Names(name, resolve(name))


def resolve(name: str) -> tuple[str, ...]:
    """The addresses of a name; none where it has none, or its server is silent."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVING_SECONDS)
    return tuple(dict.fromkeys(found))


def is_loopback(address: str) -> bool:
    """Whether it leads nowhere but back."""
    return address.startswith("127.") or address == "::1"


def check_name(names: Names, nodes: int, environment: Mapping[str, str] | None = None) -> Finding:
    """The machine's own name leads to an address that the others can reach."""
    env = os.environ if environment is None else environment
    named = env.get("GLOO_SOCKET_IFNAME", "")
    why = "ranks tell the others the address of their own host name, and gloo cannot connect to any other"
    mend = f"Put a line with {names.name} and its address into /etc/hosts, or mend the name server"
    if not names.addresses:
        severity: Severity = "warning" if nodes == 1 or named else "error"
        return Finding(severity, "host name", f"{names.name} does not resolve", names.name, why, f"{mend}.")
    if nodes > 1 and all(map(is_loopback, names.addresses)):
        if named and named != "lo":
            return ok("host name", f"resolves to loopback alone, but GLOO_SOCKET_IFNAME is {named}", names.name)
        what = f"{names.name} resolves to {', '.join(names.addresses)} alone, which is loopback"
        remedy = f"{mend}; or export GLOO_SOCKET_IFNAME with the name of the network interface."
        return Finding("error", "host name", what, names.name, why, remedy)
    return ok("host name", f"resolves to {', '.join(names.addresses[:3])}", names.name)


def check_rendezvous(host: str, nodes: int) -> Finding:
    """The name of the first node leads somewhere, and not back to each node itself."""
    found = resolve(host)
    check = "rendezvous"
    if not found:
        return Finding(
            "error",
            check,
            f"the name {host} does not resolve",
            socket.gethostname(),
            "all ranks meet there",
            "Name the first node as all nodes know it, or give its address: --rendezvous HOST:PORT.",
        )
    if nodes > 1 and all(map(is_loopback, found)):
        return Finding(
            "error",
            check,
            f"{host} is loopback ({', '.join(found)}): each node would wait for itself",
            socket.gethostname(),
            "ranks on other nodes cannot come to an address that leads back to themselves",
            "Give the first node's address in the network that the nodes share: --rendezvous HOST:PORT.",
        )
    return ok(check, f"{host} resolves to {found[0]}", socket.gethostname())


def check_limits(gpus: int) -> list[Finding]:
    """Open files, processes, locked memory, shared memory, cores and threads."""
    name = socket.gethostname()
    findings = [_check_files(name), _check_processes(name), _check_shared_memory(name, gpus), _check_threads(name)]
    memory, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if memory != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        findings.append(
            Finding(
                "error",
                "locked memory",
                f"at most {memory >> 10:,} KiB may be locked, and this node has InfiniBand",
                name,
                "NCCL registers its buffers with the adapter, which locks them",
                "Let `ulimit -l` say unlimited: in limits.conf, and in the scheduler's service file.",
            )
        )
    return findings


def _check_files(name: str) -> Finding:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files >= _FEW_FILES or files == resource.RLIM_INFINITY:
        return ok("open files", f"{files:,} a process", name)
    raised = f"`ulimit -n {most}`" if most > files or most == resource.RLIM_INFINITY else "limits.conf"
    return Finding(
        "warning",
        "open files",
        f"a process may open {files:,} files at once",
        name,
        "each connection to a rank, each process that collates and each data file takes some",
        f"Raise it to {_FEW_FILES:,} or more: {raised}.",
    )


def _check_processes(name: str) -> Finding:
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes >= _FEW_PROCESSES or processes == resource.RLIM_INFINITY:
        return ok("processes", "no limit" if processes == resource.RLIM_INFINITY else f"{processes:,} a user", name)
    return Finding(
        "warning",
        "processes",
        f"this user may have {processes:,} processes and threads",
        name,
        "a rank takes dozens of threads",
        f"Raise `ulimit -u` to {_FEW_PROCESSES:,} or more.",
    )


def _check_shared_memory(name: str, gpus: int) -> Finding:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return Finding(
            "error", "shared memory", "there is no /dev/shm", name, "processes of a node talk through it", "Mount it."
        )
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    if free >= _LITTLE_SHARED_MEMORY:
        return ok("shared memory", f"{free / 2**30:.1f} GiB free in /dev/shm", name)
    return Finding(
        "error" if gpus > 1 else "warning",
        "shared memory",
        f"{free / 2**20:,.0f} MiB of {size / 2**20:,.0f} MiB are free in /dev/shm",
        name,
        "NCCL and the processes that collate batches pass their data through it; a rank that finds it full dies",
        "Give the container more (docker: --shm-size=8g or --ipc=host), or clear what lies there.",
    )


def _check_threads(name: str) -> Finding:
    cores, said = cores_of_this_process(), os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > cores:
        return Finding(
            "warning",
            "cores",
            f"OMP_NUM_THREADS is {said}, and this process may use {cores} cores",
            name,
            "threads that share a core wait for one another in each operation",
            f"Set it to {cores} divided by the ranks of this node.",
        )
    busy, all_cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > all_cores + 1:
        return Finding(
            "warning",
            "cores",
            f"{busy:.1f} processes want to run, on {all_cores} cores",
            name,
            "the slowest node sets the pace of all",
            "See with `top` who they are, and start when they have gone.",
        )
    threads = f"OMP_NUM_THREADS {said}" if said else "OMP_NUM_THREADS not set, which gives a launched rank one thread"
    return ok("cores", f"{cores} to use, load {busy:.1f}, {threads}", name)
