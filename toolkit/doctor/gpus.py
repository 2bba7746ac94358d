"""`python -m toolkit.doctor.gpus`: the GPUs of this machine, as `nvidia-smi` tells of them.

A process of its own, because a broken driver hangs. It prints `gpus`: {"names", "driver", "findings"}.
"""

from __future__ import annotations

import socket
import subprocess
from dataclasses import asdict, dataclass

from toolkit.doctor.findings import Finding, ok
from toolkit.doctor.probes import say

_SECONDS = 15.0
_FIELDS = (
    *("index", "name", "driver_version", "memory.total", "memory.used", "utilization.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "clocks_event_reasons.active", "temperature.gpu"),
)
_SLOWING = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of `clocks_event_reasons.active` that slow a GPU that works, by nvml.h. Idle and power caps are none of them."""
_MUCH_MEMORY = 0.05


@dataclass(frozen=True)
class Gpus:
    """What was found.

    Attributes:
        names: of each GPU.
        driver: version.
        findings: of their health.
    """

    names: tuple[str, ...] = ()
    driver: str = ""
    findings: tuple[Finding, ...] = ()


def look_at_gpus() -> Gpus:
    """All of this machine's; none where there is no driver."""
    node = socket.gethostname()
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        return Gpus()
    except subprocess.TimeoutExpired:
        return Gpus(findings=(_silent(f"it did not answer in {_SECONDS:.0f} s", node),))
    if done.returncode:
        return Gpus(findings=(_silent((done.stdout + done.stderr).strip().splitlines()[0], node),))
    rows = [dict(zip(_FIELDS, map(str.strip, line.split(",")), strict=True)) for line in done.stdout.splitlines()]
    findings = [finding for row in rows for finding in check_gpu(row, node)]
    if rows and not findings:
        findings = [ok("GPUs", f"{len(rows)} × {rows[0]['name']}, driver {rows[0]['driver_version']}", node)]
    return Gpus(tuple(row["name"] for row in rows), rows[0]["driver_version"] if rows else "", tuple(findings))


def _silent(reason: str, node: str) -> Finding:
    return Finding(
        "error",
        "GPUs",
        f"nvidia-smi fails: {reason}",
        node,
        "no rank can use a GPU whose driver does not answer",
        "See `dmesg`; load the driver again or restart the node.",
    )


def check_gpu(row: dict[str, str], node: str) -> list[Finding]:
    """What is wrong with a GPU, by the fields that nvidia-smi was asked for."""
    which, found = f"GPU {row['index']}", []
    total, used = _number(row["memory.total"]), _number(row["memory.used"])
    if total and used > _MUCH_MEMORY * total:
        found.append(
            Finding(
                "warning",
                "GPUs",
                f"{which}: {used:,} of {total:,} MiB are taken, {row['utilization.gpu']} % busy",
                node,
                "a rank may run out of memory in the middle of a run",
                "See with nvidia-smi whose processes they are, and end them, or take another GPU.",
            )
        )
    if errors := _number(row["ecc.errors.uncorrected.volatile.total"]):
        found.append(
            Finding(
                "error",
                "GPUs",
                f"{which}: {errors} memory errors that could not be corrected",
                node,
                "numbers may be wrong without a word",
                "Take the node out and reset the GPU; if they come back, it is to be replaced.",
            )
        )
    reasons = row["clocks_event_reasons.active"]
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    if slowing := [text for bit, text in _SLOWING.items() if bits & bit]:
        found.append(
            Finding(
                "warning",
                "GPUs",
                f"{which} is slowed: {', '.join(slowing)}, at {row['temperature.gpu']} °C",
                node,
                "the slowest GPU sets the pace of all",
                "Look after cooling and power of the node.",
            )
        )
    return found


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


if __name__ == "__main__":
    say(gpus=asdict(look_at_gpus()))
