"""`python -m launch slurm RECIPE --nodes N --gpus G --time T … -- RECIPE OPTIONS`: a recipe as a job of SLURM.

The job's script is rendered from `launch/templates/slurm.sh` into the run's folder, and submitted from there; with
`--dry-run` it is printed, and nothing else is done. It stands alone: `sbatch` takes it without this program. What can
be known before a job waits in a queue is checked before.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.errors import UserError
from launch.jobs import enter
from launch.site import set_defaults
from launch.slurm_client import checked_id, submit
from launch.slurm_script import JobScript, render

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
STRATEGIES = {
    "ddp": ("two_nodes", ()),
    "fsdp": ("two_nodes_fsdp", ()),
    "hybrid": ("two_nodes_fsdp", ("--strategy.shard_size", "{processes}")),
    "zero1": ("two_nodes", ("--strategy.name", "zero1")),
    "zero2": ("two_nodes", ("--strategy.name", "zero2")),
    "zero3": ("two_nodes_zero3", ()),
}
"""File for `accelerate launch`, and options for the recipe."""

NOT_FOR_SITES = ("nodes", "name", "run-dir", "array", "dependency", "dry-run", "accelerate-config", "processes", "cpu")
RESERVED = (
    *("nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gres", "cpus-per-task", "time", "signal"),
    *("requeue", "no-requeue", "array", "output", "error", "chdir", "export", "job-name", "open-mode", "wrap"),
)
"""What the script says itself."""

_NAME = re.compile(r"[A-Za-z0-9][\w.+@:,-]*")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_AFTER = re.compile(r"(after|afterany|afterok|afternotok|aftercorr|afterburstbuffer)(:[^:,?]+)+|singleton")
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(?:(\d+):)?(\d+):(\d+))|(\d+))")


def main(argv: Sequence[str]) -> int:
    """Submit a job, or print its script."""
    dashes = list(argv).index("--") if "--" in argv else len(argv)
    options = parse(argv[:dashes])
    job = _job(options, list(argv[dashes + 1 :]), shlex.join(["python", "-m", "launch", "slurm", *argv]))
    text = render(job)
    if options.dry_run:
        print(text, end="")
        return 0
    if options.check and not job.container:
        _check_recipe(job)
    number = _submit(job, text)
    print(_told(job, number))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, over those of the site's files.

    Raises:
        UserError: a site's file is wrong.
        SystemExit: after `--help`, or after an error that is told, with 2.
    """
    parser = _parser()
    set_defaults(parser, {_dashed(a): a for a in parser._actions if _dashed(a) not in (*NOT_FOR_SITES, "help", "")})
    return parser.parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch slurm", usage="%(prog)s RECIPE --nodes N --gpus G --time T [OPTIONS] -- RECIPE OPTIONS"
    )
    parser.description = "Run a recipe as a job of SLURM, which saves and queues itself again before its time is over."
    parser.epilog = "Defaults for a site: launch/site.yaml and ~/.config/largemodel-toolkit/slurm.yaml."
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="file of the recipe, as recipes/sft.py")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus", type=int, metavar="G", help="on each node; as many processes")
    add("--cpu", action="store_true", help="CPU processes, without GPUs")
    add("--processes", type=int, metavar="P", help="on each node, with --cpu (default: 1)")
    add("--time", metavar="T", help="limit of one start, as 4:00:00 or 2-00:00:00")
    add("--partition", default="", help="queue (default: the site's)")
    add("--account", default="", help="who pays")
    add("--qos", default="", help="quality of service")
    add("--array", default="", metavar="INDICES", help="as 0-3: a run for each, with the index as its --run.seed")
    add("--dependency", default="", help="as afterok:1234")
    add("--cpus-per-task", dest="cpus", type=int, default=0, metavar="C", help="cores of a node for its processes")
    add("--mem", default="", help="memory of a node, as 480G")
    add("--signal-lead", type=int, default=300, metavar="S", help="seconds before the limit to save (default: 300)")
    add("--requeues", type=int, default=3, metavar="K", help="at most so many without a new checkpoint (default: 3)")
    add("--name", default="", help="of the job, and of the run's folder")
    add("--run-dir", default="", metavar="DIR", help="the run's folder (default: runs/RECIPE/, the name or a number)")
    add("--strategy", choices=list(STRATEGIES), default="ddp", help="what accelerate asks the recipe for")
    add("--accelerate-config", default="", metavar="FILE", help="another file for accelerate launch")
    add("--container", default="", metavar="IMAGE", help="a .sif for apptainer; a .sqsh or docker:// URI for pyxis")
    add("--python", default="", help="of the recipe's environment (default: the active one's)")
    add("--setup", default="", metavar="FILE", help="shell script read at the start of the job: modules, NCCL, proxies")
    add("--export", default=[], action="append", metavar="NAME", help="a further variable to hand on; may be repeated")
    add("--sbatch", default=[], action="append", metavar="OPTION", help="a further option of sbatch; may be repeated")
    add("--preflight", action=argparse.BooleanOptionalAction, default=True, help="look at the nodes before training")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="parse the recipe's options first")
    add("--dry-run", action="store_true", help="print the script, and do nothing else")
    return parser


def _dashed(action: argparse.Action) -> str:
    return action.option_strings[0].lstrip("-") if action.option_strings else ""


def _job(options: argparse.Namespace, recipe_options: list[str], command: str) -> JobScript:
    processes = _check_size(options)
    _check_time(options)
    _check_names(options)
    recipe = Path(options.recipe)
    if not recipe.is_file():
        raise UserError(f"{recipe}: there is no such recipe", "Name the file, as recipes/sft.py, from where you are.")
    for option in recipe_options:
        key = option.split("=")[0].replace("-", "_")
        if key in ("__run.dir", "__run.name") or (key == "__run.seed" and options.array):
            why = (
                "--array gives each run its index as seed" if key == "__run.seed" else "use --run-dir before the dashes"
            )
            raise UserError(f"{option.split('=')[0]} is set by the job: {why}", "Drop it.")
    config, extra = STRATEGIES[options.strategy]
    run = _run_folder(options, recipe.stem)
    return JobScript(
        recipe=[str(recipe), *(word.format(processes=processes) for word in extra), *recipe_options],
        run=run,
        name=options.name or f"{recipe.stem}-{run.name}",
        folder=Path.cwd(),
        python=options.python or _active_python(bool(options.container)),
        config=_config_file(options.accelerate_config, config),
        command=command,
        processes=processes,
        gpus=0 if options.cpu else processes,
        cpus=options.cpus or (processes if options.cpu else 0),
        setup=str(Path(options.setup).resolve()) if options.setup else "",
        **{name: getattr(options, name) for name in _COPIED},
    )


_COPIED = (
    *("nodes", "time", "signal_lead", "requeues", "partition", "account", "qos", "array", "dependency", "mem"),
    *("container", "export", "sbatch", "preflight"),
)


def _check_size(options: argparse.Namespace) -> int:
    """Processes on each node."""
    if options.cpu and options.gpus:
        raise UserError("--cpu and --gpus contradict each other", "Drop one of the two.")
    if not options.cpu and options.gpus is None:
        raise UserError("--gpus is missing: how many GPUs of each node?", "Say --gpus 8, or --cpu --processes P.")
    if options.processes is not None and not options.cpu:
        raise UserError("--processes is for --cpu: there is one process for each GPU", "Drop it.")
    size = (options.processes or 1) if options.cpu else options.gpus
    for name, value in (("--nodes", options.nodes), ("--gpus or --processes", size)):
        if value < 1:
            raise UserError(f"{name} {value}: at least 1 is needed", "Ask for one or more.")
    if options.strategy == "hybrid" and (options.nodes < 2 or size < 2):
        raise UserError(
            "--strategy hybrid holds a copy of the model on each of several nodes, shared by its processes",
            "Ask for two nodes or more with two processes or more each, or say --strategy fsdp.",
        )
    if options.requeues < 0 or options.cpus < 0:
        raise UserError("--requeues and --cpus-per-task are not negative", "Drop the sign.")
    return int(size)


def _check_time(options: argparse.Namespace) -> None:
    if not options.time:
        raise UserError("--time is missing: how long may one start of the job take?", "Say --time 4:00:00.")
    match = _TIME.fullmatch(options.time)
    if match is None:
        raise UserError(f"--time {options.time} is no time", "Write 90 (minutes), 4:00:00 or 2-12:00:00.")
    days, hours, minutes, seconds, *short, alone = match.groups()
    whole = [int(part or 0) for part in ((days, hours, minutes, seconds) if days else (0, *short))]
    if alone:
        whole = [0, 0, int(alone), 0]
    limit = ((whole[0] * 24 + whole[1]) * 60 + whole[2]) * 60 + whole[3]
    if options.signal_lead < 60:
        raise UserError(f"--signal-lead {options.signal_lead} is too short to save in", "Give it a minute or more.")
    if limit <= options.signal_lead:
        raise UserError(
            f"--time {options.time} is not longer than --signal-lead {options.signal_lead} s: the job would be asked "
            "to stop when it begins",
            "Ask for more time, or for the signal later.",
        )


def _check_names(options: argparse.Namespace) -> None:
    for name in ("partition", "account", "qos", "mem", "name"):
        value = getattr(options, name)
        if value and not _NAME.fullmatch(value):
            raise UserError(f"--{name} {value!r} is no name for SLURM", "Use letters, digits, dots and dashes.")
    if options.array and not _ARRAY.fullmatch(options.array):
        raise UserError(f"--array {options.array!r} is no list of indices", "Write 0-3, or 0,2,5, or 0-9%2.")
    for condition in filter(None, re.split("[,?]", options.dependency)):
        if not _AFTER.fullmatch(condition):
            raise UserError(f"--dependency {condition!r} is no condition", "Write afterok:1234, or singleton.")
        for job in condition.split(":")[1:]:
            checked_id(job.split("+")[0])
    for variable in options.export:
        if not re.fullmatch(r"[A-Za-z_]\w*", variable):
            raise UserError(f"--export {variable!r} is no name of a variable", "Name it; its value is taken along.")
    for option in options.sbatch:
        if not re.fullmatch(r"--[a-z][\w-]*(=[^\s\"'\\#]+)?", option):
            raise UserError(f"--sbatch {option!r} is no option of sbatch", "Write --sbatch=--constraint=a100.")
        if option[2:].split("=")[0] in RESERVED:
            raise UserError(
                f"--sbatch {option} would contradict the script, which starts one task on each node and says so itself",
                "Use the options of this command.",
            )
    for name in ("setup", "accelerate_config"):
        file = getattr(options, name)
        if file and not Path(file).is_file():
            raise UserError(f"--{name.replace('_', '-')} {file}: there is no such file", "Name one that all nodes see.")


def _run_folder(options: argparse.Namespace, recipe: str) -> Path:
    parent = Path.cwd() / "runs" / recipe
    if options.run_dir:
        run = Path(options.run_dir).absolute()
    elif options.name:
        run = parent / options.name
    else:
        taken = [int(path.name) for path in parent.iterdir() if path.name.isdigit()] if parent.is_dir() else []
        run = parent / f"{max(taken, default=0) + 1:03d}"
    if (run / "slurm" / "job.sh").exists():
        raise UserError(
            f"{run} is the folder of another job", f"Go on with it: python -m launch resume {run}. Or name a new one."
        )
    return run


def _config_file(file: str, shipped: str) -> str:
    path = Path(file).absolute() if file else CONFIGS / f"{shipped}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is not there", "Run this from a clone of the project, or name --accelerate-config.")
    return os.path.relpath(path) if Path.cwd() in path.parents else str(path)


def _active_python(container: bool) -> str:
    if container:
        return "python"
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    return str(Path(active) / "bin" / "python") if active else sys.executable


def _check_recipe(job: JobScript) -> None:
    """Let the recipe parse its options, as it will on the nodes: a misspelt one is found before the job waits."""
    done = subprocess.run(
        [job.python, *job.recipe, "--run.dir", str(job.run), "--print-config"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 2:
        sys.stderr.write(done.stderr)
        raise UserError(f"{job.recipe[0]} does not take these options (see above)", "Mend them. Nothing was submitted.")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"launch: {job.python} could not check the options of {job.recipe[0]} here: {why}", file=sys.stderr)


def _submit(job: JobScript, text: str) -> str:
    folder, new = job.script.parent, not job.run.exists()
    try:
        folder.mkdir(parents=True)
        job.script.write_text(text, encoding="utf-8")
        job.script.chmod(0o700)  # options may be nobody else's business
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}", "Name another folder with --run-dir.") from error
    try:
        number = submit(str(job.script))
    except UserError:
        job.script.unlink()
        folder.rmdir()
        if new:
            job.run.rmdir()
        raise
    enter(job.run, number)
    return number


def _told(job: JobScript, number: str) -> str:
    run = os.path.relpath(job.run) if job.folder in job.run.parents else str(job.run)
    lines = [f"job     {number}: {job.name}", f"run     {run}" + (f"/{{{job.array}}}" if job.array else "")]
    for what, command in (("follow", "logs --follow"), ("look at", "status"), ("stop", "stop"), ("go on", "resume")):
        lines.append(f"{what:7} python -m launch {command} {shlex.quote(run)}")
    return "\n".join(lines)
