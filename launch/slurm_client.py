"""SLURM's commands, called with lists of arguments, and what they say of a job."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.errors import UserError

JOB_ID = re.compile(r"[1-9]\d{0,9}(_\d{1,7})?")
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED"),
)
"""States in which a job stays."""

_FIELDS = (
    *("JobId", "ArrayJobId", "ArrayTaskId", "JobName", "JobState", "Reason", "Restarts", "RunTime", "TimeLimit"),
    *("NodeList", "ExitCode"),
)
_SECONDS = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job, or of one task of an array.

    Attributes:
        fields: of `scontrol show job`, by SLURM's own names.
    """

    fields: dict[str, str]

    @property
    def id(self) -> str:
        """SLURM's number; each task of an array has its own once it has started."""
        return self.fields["JobId"]

    @property
    def index(self) -> str:
        """Of a task in its array; empty for a plain job. A pending array has one entry for many, as `0-3`."""
        return self.fields.get("ArrayTaskId", "")

    @property
    def state(self) -> str:
        """As PENDING, RUNNING, COMPLETED."""
        return self.fields.get("JobState", "UNKNOWN")

    @property
    def ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED

    @property
    def restarts(self) -> int:
        """How often it was queued again."""
        return int(self.fields.get("Restarts", "0"))

    def seconds(self, field: str) -> int | None:
        """`RunTime` or `TimeLimit` in seconds; None for UNLIMITED."""
        return seconds(self.fields.get(field, ""))


def call(*command: str) -> str:
    """What a command of SLURM prints.

    Raises:
        UserError: it is not there, or fails; with its own words.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on the path: SLURM is not installed on this machine",
            "Log in to a node of the cluster from which jobs are submitted, or load its module; "
            "`--dry-run` prints the script anywhere.",
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} has not answered for two minutes", "Is SLURM's controller up? `scontrol ping` tells."
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"{command[0]} ended with {done.returncode}"
        raise UserError(f"SLURM says: {said}")
    return done.stdout


def checked_id(text: str) -> str:
    """`text`, if it is the number of a job.

    Raises:
        UserError: it is not.
    """
    if not JOB_ID.fullmatch(text):
        raise UserError(f"{text!r} is not the number of a job", "Job numbers are as 1234, or 1234_5 in an array.")
    return text


def job_states(job: str) -> list[JobState]:
    """What SLURM knows of a job: one entry, or one for each task of an array; none where it has forgotten it.

    Raises:
        UserError: `job` is no number of one, or SLURM does not answer.
    """
    try:
        text = call("scontrol", "--oneliner", "show", "job", checked_id(job))
    except UserError as error:
        if "Invalid job id" in error.message:
            return _remembered(job)
        raise
    return [JobState(_fields(line)) for line in text.splitlines() if line.startswith("JobId=")]


def seconds(text: str) -> int | None:
    """A time as SLURM writes it (minutes aside): `D-H:M:S`, `H:M:S`, `M:S`; None for one without an end."""
    match = _SECONDS.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def signal_batch(job: str, name: str) -> None:
    """Send a signal to a job's batch script alone, which hands it on."""
    call("scancel", "--batch", f"--signal={name}", checked_id(job))


def cancel(job: str) -> None:
    """Take a job out of the queue, or end it."""
    call("scancel", checked_id(job))


def submit(script: str, options: Sequence[str] = ()) -> str:
    """Submit a script; the job's number.

    Raises:
        UserError: SLURM refuses it, with its own words.
    """
    said = call("sbatch", "--parsable", *options, script).strip()
    return checked_id(said.split(";")[0])


def _fields(line: str) -> dict[str, str]:
    found = {}
    for name in _FIELDS:
        match = re.search(rf"(?:^|\s){name}=(.*?)(?=\s[A-Z][\w/:]*=|\s*$)", line)
        if match:
            found[name] = match[1]
    return found


def _remembered(job: str) -> list[JobState]:
    """From the accounting, where there is one: `scontrol` forgets jobs some minutes after their end."""
    if shutil.which("sacct") is None:
        return []
    try:
        text = call(
            "sacct", "-n", "-X", "-P", "-j", job, "-o", "JobID,JobName,State,Elapsed,Timelimit,NodeList,ExitCode"
        )
    except UserError:  # accounting is switched off
        return []
    found = []
    for line in text.splitlines():
        number, name, state, elapsed, limit, nodes, code = line.split("|")
        base, _, index = number.partition("_")
        fields = {"JobId": base, "JobName": name, "JobState": state.split()[0], "RunTime": elapsed, "TimeLimit": limit}
        fields.update({"NodeList": nodes, "ExitCode": code, "Restarts": "0"})
        if index:
            fields["ArrayTaskId"] = index
        found.append(JobState(fields))
    return found
