"""The batch script of a SLURM job: what `launch/templates/slurm.sh` becomes with the values of one job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launch.errors import UserError

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sh"

EXPORTED = (
    *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "PATH"),
    *("TOOLKIT_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"),
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
)
"""Variables that a job gets from where it is submitted, where they are set. No others, and no secrets."""

AFTER_GRACE = 40
"""Seconds of the signal's lead that are left for ending what has not saved by then, and for queueing again."""


class _Bash(Template):
    """A template whose own marks are not the shell's: `@@{name}`."""

    delimiter = "@@"


@dataclass(frozen=True)
class JobScript:
    """What a job's script is made of.

    Attributes:
        recipe: its file, then its options.
        run: the run's folder; of an array, the folder of its runs. Absolute.
        name: of the job.
        folder: the working directory. Absolute.
        python: of the recipe's environment, on the nodes or in the container.
        config: for `accelerate launch --config_file`.
        command: by which the script was written.
        nodes: how many.
        gpus: on each node; 0 for CPU processes.
        processes: on each node.
        time: limit, as SLURM takes it.
        signal_lead: seconds before the limit at which the run is asked to save.
        requeues: how often the job may queue itself again without a new checkpoint.
        partition, account, qos, array, dependency, mem: as SLURM takes them; empty for the site's default.
        cpus: cores of a node for its processes; 0 for the site's default.
        container: an image for apptainer (`.sif`), or for pyxis.
        setup: a shell script that is read at the job's start.
        export: further variables to hand on.
        sbatch: further options of sbatch.
        preflight: whether `toolkit doctor` looks at the nodes first.
    """

    recipe: Sequence[str]
    run: Path
    name: str
    folder: Path
    python: str
    config: str
    command: str
    nodes: int
    gpus: int
    processes: int
    time: str
    signal_lead: int
    requeues: int
    partition: str = ""
    account: str = ""
    qos: str = ""
    array: str = ""
    dependency: str = ""
    mem: str = ""
    cpus: int = 0
    container: str = ""
    setup: str = ""
    export: Sequence[str] = ()
    sbatch: Sequence[str] = ()
    preflight: bool = True

    @property
    def script(self) -> Path:
        """Where the script lies."""
        return self.run / "slurm" / "job.sh"


def render(job: JobScript) -> str:
    """The script.

    Raises:
        UserError: a value that cannot stand in a script.
    """
    devices = f"{job.gpus} GPUs" if job.gpus else f"{job.processes} CPU processes"
    each = f"; an array of runs, {job.array}" if job.array else ""
    values = {
        "title": f"{job.name}: {Path(job.recipe[0]).stem} on {job.nodes} nodes with {devices} each{each}.",
        "script": shlex.quote(str(job.script)),
        "command": " ".join(job.command.splitlines()),
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(job)),
        "setup": f"\n# shellcheck source=/dev/null\n. {shlex.quote(job.setup)}" if job.setup else "",
        # SLURM's number of a task may also be that of the whole array.
        "job": '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if job.array else "$SLURM_JOB_ID",
        "run": shlex.quote(str(job.run)) + ('/"$SLURM_ARRAY_TASK_ID"' if job.array else ""),
        "recipe": _words(job.recipe),
        "config": shlex.quote(job.config),
        "python": _python(job),
        "per_node": str(job.processes),
        "array": '\nrecipe+=(--run.seed "$SLURM_ARRAY_TASK_ID")' if job.array else "",
        "granted": _GRANTED if job.gpus else "",
        "starts": str(job.requeues + 1),
        "cpu": "" if job.gpus else "\nexport ACCELERATE_USE_CPU=true",
        "pyxis": _pyxis(job),
        "container": ' "${container[@]}"' if _pyxis(job) else "",
        "preflight": _PREFLIGHT if job.preflight else "",
        "grace": str(job.signal_lead - AFTER_GRACE),
    }
    if broken := [name for name, value in values.items() if "\n" in value.strip("\n") and name not in _SEVERAL_LINES]:
        raise UserError(f"a line break in {broken[0]} cannot stand in a batch script", "Remove it.")
    return _Bash(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


_SEVERAL_LINES = ("directives", "granted", "preflight", "recipe", "setup")

_GRANTED = """
granted=${SLURM_GPUS_ON_NODE:-0}
[ "$granted" = "$per_node" ] || fail "$per_node GPUs on each node were asked for, and $granted are there\""""

_PREFLIGHT = """

# Look at the nodes, and at whether they reach each other, before the ranks start.
doctor=(doctor --nodes "$SLURM_NNODES")
[ "$SLURM_NNODES" = 1 ] || doctor+=(--rank @node --rendezvous "$address:$((port + 1))" --port "$port")
"${everywhere[@]}" "${python[@]}" -m toolkit.cli "${doctor[@]}" -- "${recipe[@]}" || exit 2"""


def _directives(job: JobScript) -> Iterable[str]:
    slurm = job.run / "slurm"
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield "--ntasks-per-node=1"
    if job.gpus:
        yield f"--gpus-per-node={job.gpus}"
    if job.cpus:
        yield f"--cpus-per-task={job.cpus}"
    for name in ("mem", "time", "partition", "account", "qos", "array", "dependency"):
        if value := getattr(job, name):
            yield f"--{name}={value}"
    yield f"--signal=B:USR1@{job.signal_lead}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={_path(slurm, percent=True)}/{'%A_%a' if job.array else '%j'}.log"
    yield f"--chdir={_path(job.folder)}"
    yield f"--export={','.join([*EXPORTED, *job.export])}"
    yield from job.sbatch


def _path(path: Path, percent: bool = False) -> str:
    """A path as it can stand after `#SBATCH`, where a shell's quotes are not known."""
    if re.search(r"""["'\\\s#]""", str(path)):
        raise UserError(
            f"{str(path)!r}: SLURM does not take spaces, quotes or # in the path of a job",
            "Name another folder with --run-dir, or go to one.",
        )
    return str(path).replace("%", "%%") if percent else str(path)


def _python(job: JobScript) -> str:
    if not job.container.endswith(".sif"):
        return shlex.quote(job.python)
    gpus = "--nv " if job.gpus else ""
    return f'apptainer exec {gpus}--bind "$PWD,$run" {shlex.quote(job.container)} {shlex.quote(job.python)}'


def _pyxis(job: JobScript) -> str:
    if not job.container or job.container.endswith(".sif"):
        return ""
    image = f"--container-image={shlex.quote(job.container)}"
    return f'\ncontainer=({image} --container-mounts="$PWD:$PWD,$run:$run" --container-workdir="$PWD")'


def _words(words: Sequence[str]) -> str:
    """Words of an array, over several lines where one would be too long: an option and its value on the same."""
    lines, line = [], ""
    for index, word in enumerate(words):
        quoted = shlex.quote(word)
        if line and len(line) + len(quoted) > 90 and (word.startswith("-") or not words[index - 1].startswith("-")):
            lines.append(line)
            line = ""
        line = f"{line} {quoted}" if line else quoted
    return "\n    ".join([*lines, line])
