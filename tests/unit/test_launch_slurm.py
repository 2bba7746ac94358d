"""`python -m launch slurm`: the script that it renders, its options, a site's defaults, and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import jobs, site, slurm_client
from launch.__main__ import main
from launch.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = "--nodes 2 --gpus 8 --time 4:00:00"
RECIPE = "recipes/sft.py"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in an empty project, with nobody's own defaults: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(site, "PROJECT", tmp_path / "site.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / RECIPE).touch()

    def call(words: str, recipe: str = "", command: str = "slurm") -> tuple[int, str, str]:
        code = main([command, *words.split(), *(["--", *recipe.split()] if recipe else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


VARIANTS = {
    "plain": SIZE,
    "cpu": "--nodes 2 --cpu --processes 2 --time 90 --no-preflight",
    "one process": "--cpu --time 1-00:00:00 --mem 8G",
    "array": f"{SIZE} --array 0-3%2 --strategy hybrid --cpus-per-task 64",
    "site": f"{SIZE} --partition gpu --account me --qos high --dependency afterok:12?singleton --setup recipes/sft.py",
    "apptainer": f"{SIZE} --container image.sif --strategy zero3",
    "pyxis": f"{SIZE} --container docker://nvcr.io/nvidia/pytorch:25.01-py3 --strategy fsdp",
    "more": f"{SIZE} --sbatch=--exclusive --sbatch=--constraint=a100 --export NCCL_DEBUG --requeues 0",
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_script_is_bash(options: str, launch: Call, tmp_path: Path) -> None:
    code, script, _ = launch(f"{RECIPE} {options} --dry-run", "--model.name /a/model --data.name it's --x $HOME;id")
    assert code == 0
    assert "'it'\"'\"'s'" in script
    assert "'$HOME;id'" in script
    assert "@@" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert len(script.splitlines()) < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes"]  # nothing was written
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_it_asks_slurm_for(launch: Call, tmp_path: Path) -> None:
    _, script, _ = launch(f"{RECIPE} {SIZE} --partition gpu --cpus-per-task 64 --dry-run --requeues 5")
    run = tmp_path / "runs" / "sft" / "001"
    assert directives(script) == [
        "--job-name=sft-001",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--time=4:00:00",
        "--partition=gpu",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output={run}/slurm/%j.log",
        f"--chdir={tmp_path}",
        directives(script)[-1],
    ]
    handed_on = directives(script)[-1].removeprefix("--export=").split(",")
    assert {"PATH", "HOME"} <= set(handed_on)
    assert not {"ALL", "NONE", "HF_TOKEN"} & set(handed_on)
    for line in (
        f"run={run}",
        'recipe=(recipes/sft.py --run.dir "$run")',
        "launcher=(--config_file " + os.path.relpath(ROOT / "configs/accelerate/two_nodes.yaml", tmp_path) + ")",
        "per_node=8  # processes",
        '[ "$(tail -n 1 "$starts" | grep -cxFf - "$starts")" -le 6 ] || fail "6 starts without a new checkpoint"',
    ):
        assert line.split("../")[0] in script, line
    assert "--kill-on-bad-exit=1" in script
    assert "--grace 260" in script


def test_what_differs(launch: Call, tmp_path: Path) -> None:
    def script(options: str) -> str:
        return launch(f"{RECIPE} {options} --dry-run")[1]

    assert "ACCELERATE_USE_CPU=true" in script(VARIANTS["cpu"])
    assert "doctor" not in script(VARIANTS["cpu"])
    assert '-m toolkit.cli "${doctor[@]}" -- "${recipe[@]}" || exit 2' in script(SIZE)
    array = script(VARIANTS["array"])
    assert f'run={tmp_path}/runs/sft/001/"$SLURM_ARRAY_TASK_ID"' in array
    assert 'recipe+=(--run.seed "$SLURM_ARRAY_TASK_ID")' in array
    assert "--strategy.shard_size 8" in array
    assert "two_nodes_fsdp.yaml" in array
    assert "/slurm/%A_%a.log" in array
    assert "two_nodes_zero3.yaml" in script(VARIANTS["apptainer"])
    assert 'python=(apptainer exec --nv --bind "$PWD,$run" image.sif python)' in script(VARIANTS["apptainer"])
    assert "--container-image=docker://nvcr.io/nvidia/pytorch:25.01-py3" in script(VARIANTS["pyxis"])
    assert "--strategy.name zero1" in script(f"{SIZE} --strategy zero1")
    assert f". {tmp_path}/recipes/sft.py" in script(VARIANTS["site"])


def test_the_next_number_and_names(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "runs" / "sft" / "007").mkdir(parents=True)
    assert f"run={tmp_path}/runs/sft/008" in launch(f"{RECIPE} {SIZE} --dry-run")[1]
    named = launch(f"{RECIPE} {SIZE} --name night --dry-run")[1]
    assert f"run={tmp_path}/runs/sft/night" in named
    assert "--job-name=night" in named
    assert "run=/big/disk/r" in launch(f"{RECIPE} {SIZE} --run-dir /big/disk/r --dry-run")[1]


@pytest.mark.parametrize(
    ("words", "recipe", "fact"),
    [
        (f"recipes/stf.py {SIZE}", "", "recipes/stf.py: there is no such recipe"),
        (f"{RECIPE} --nodes 2 --time 4:00:00", "", "--gpus is missing: how many GPUs of each node?"),
        (f"{RECIPE} --gpus 8", "", "--time is missing"),
        (f"{RECIPE} --gpus 8 --time soon", "", "--time soon is no time"),
        (f"{RECIPE} --gpus 8 --time 5", "", "--time 5 is not longer than --signal-lead 300 s"),
        (f"{RECIPE} --gpus 8 --time 4:00 ", "", "--time 4:00 is not longer than --signal-lead 300 s"),
        (f"{RECIPE} --gpus 8 --time 90 --signal-lead 10", "", "--signal-lead 10 is too short to save in"),
        (f"{RECIPE} {SIZE} --cpu", "", "--cpu and --gpus contradict each other"),
        (f"{RECIPE} {SIZE} --processes 2", "", "--processes is for --cpu"),
        (f"{RECIPE} --gpus 8 --time 90 --strategy hybrid", "", "--strategy hybrid holds a copy of the model on each"),
        (f"{RECIPE} --gpus 0 --time 90", "", "--gpus or --processes 0: at least 1 is needed"),
        (f"{RECIPE} --nodes 0 --gpus 1 --time 90", "", "--nodes 0: at least 1 is needed"),
        (f"{RECIPE} {SIZE} --dependency afterok:1;id", "", "'1;id' is not the number of a job"),
        (f"{RECIPE} {SIZE} --dependency never:1", "", "--dependency 'never:1' is no condition"),
        (f"{RECIPE} {SIZE} --array 1..3", "", "--array '1..3' is no list of indices"),
        (f"{RECIPE} {SIZE} --partition gpu$(id)", "", "--partition 'gpu$(id)' is no name for SLURM"),
        (f"{RECIPE} {SIZE} --sbatch=--ntasks-per-node=4", "", "would contradict the script"),
        (f"{RECIPE} {SIZE} --sbatch=--exclude=a\\b", "", "is no option of sbatch"),
        (f"{RECIPE} {SIZE} --export PATH=/x", "", "--export 'PATH=/x' is no name of a variable"),
        (f"{RECIPE} {SIZE} --setup nowhere.sh", "", "--setup nowhere.sh: there is no such file"),
        (f"{RECIPE} {SIZE}", "--run.dir elsewhere", "--run.dir is set by the job: use --run-dir"),
        (f"{RECIPE} {SIZE} --array 0-3", "--run.seed=7", "--run.seed is set by the job: --array gives each run"),
        (f"{RECIPE} {SIZE} --run-dir it's", "", "SLURM does not take spaces, quotes or # in the path"),
    ],
)
def test_what_it_refuses(words: str, recipe: str, fact: str, launch: Call) -> None:
    code, out, err = launch(f"{words} --dry-run", recipe)
    assert (code, out) == (2, "")
    assert fact in err
    assert "\n  → " in err


def test_without_slurm(launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch(f"{RECIPE} {SIZE} --no-check")
    assert code == 2
    assert "sbatch is not on the path" in err
    assert not (tmp_path / "runs" / "sft" / "001").exists()


def test_the_recipe_has_its_say(launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of its options is found before the job waits, in its own words; what cannot be asked is no obstacle."""
    script = "import sys\nassert '--print-config' in sys.argv\nsys.stderr.write('no such key')\nsys.exit({})\n"
    (tmp_path / RECIPE).write_text(script.format(2))
    code, _, err = launch(f"{RECIPE} {SIZE} --python {sys.executable}")
    assert (code, "no such key" in err, "does not take these options" in err) == (2, True, True)
    (tmp_path / RECIPE).write_text(script.format(1))
    with_sbatch(tmp_path, "echo 41", monkeypatch)
    code, _, err = launch(f"{RECIPE} {SIZE} --python {sys.executable}")
    assert (code, "could not check the options of recipes/sft.py here: no such key" in err) == (0, True)


def with_sbatch(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of sbatch, for what is done around it; the real one is in tests/slurm."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_what_is_told_and_left(launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sbatch(tmp_path, 'echo "41;cluster"', monkeypatch)
    code, out, _ = launch(f"{RECIPE} {SIZE} --no-check --name night")
    assert code == 0
    assert out.splitlines()[:3] == [
        "job     41: night",
        "run     runs/sft/night",
        "follow  python -m launch logs --follow runs/sft/night",
    ]
    folder = tmp_path / "runs" / "sft" / "night" / "slurm"
    assert (folder / "jobs").read_text() == "41\n"
    assert stat.S_IMODE((folder / "job.sh").stat().st_mode) == 0o700
    code, _, err = launch(f"{RECIPE} {SIZE} --no-check --name night")
    assert (code, "is the folder of another job" in err) == (2, True)


def test_slurms_own_words(launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sbatch(tmp_path, 'echo "sbatch: error: invalid account" >&2; exit 1', monkeypatch)
    code, _, err = launch(f"{RECIPE} {SIZE} --no-check")
    assert (code, err.strip()) == (2, "error: SLURM says: sbatch: error: invalid account")
    assert not (tmp_path / "runs" / "sft" / "001").exists()


# A site's defaults


def test_defaults_of_a_site(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "# ours\n---\npartition: gpu   # the big one\ngpus: 8\ntime: '4:00:00'\npreflight: false\nexport: NCCL_DEBUG\n"
    )
    (tmp_path / "config" / "largemodel-toolkit").mkdir(parents=True)
    (tmp_path / "config" / "largemodel-toolkit" / "slurm.yaml").write_text('account: "me"\npartition: small\n')
    script = launch(f"{RECIPE} --nodes 2 --gpus 4 --dry-run")[1]
    said = directives(script)
    assert {"--partition=small", "--account=me", "--gpus-per-node=4", "--time=4:00:00"} <= set(said)
    assert said[-1].endswith(",NCCL_DEBUG")
    assert "doctor" not in script


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("partitoin: gpu", "line 2: partitoin is no option of a site's file. Did you mean partition?"),
        ("nodes: 2", "line 2: nodes is no option of a site's file."),
        ("gpus: many", "line 2: --gpus many: invalid literal for int()"),
        ("preflight: maybe", "line 2: --preflight is true or false, not 'maybe'"),
        ("strategy: tensor", "line 2: --strategy tensor is not one of ddp, fsdp"),
        ("mem: [1, 2]", "is no `option: value`"),
        ("  mem: 8G", "is no `option: value`"),
        ("- mem", "is no `option: value`"),
        ("mem:8G", "is no `option: value`"),
        ("mem: &anchor 8G", "is no `option: value`"),
        ("mem: |", "is no `option: value`"),
        ("qos: again", "line 2: qos stands in line 1 already"),
    ],
)
def test_a_site_file_that_is_wrong(line: str, fact: str, launch: Call, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"qos: low\n{line}\n")
    code, out, err = launch(f"{RECIPE} {SIZE} --dry-run")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'site.yaml'}, line 2" in err
    assert fact in err


def test_what_yaml_makes_of_it() -> None:
    """Every line that is taken means to YAML what it means here."""
    yaml = pytest.importorskip("yaml")
    text = "a: b\nc-d: \"4:00:00\"\ne: 'x # y'\nf: /a/b.sh  # why\ng: 8\nh: docker://x:1\n"
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"site-{os.getpid()}.yaml"
    file.write_text(text)
    try:
        found = {key: value for key, (value, _) in site.read_site(file).items()}
    finally:
        file.unlink()
    assert found == {key: str(value) for key, value in yaml.safe_load(text).items()}


# What SLURM says of jobs

SHOWN = (
    "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobName=a b UserId=me(1) JobState=RUNNING Reason=None Requeue=1 Restarts=2 "
    "RunTime=1-00:00:07 TimeLimit=UNLIMITED NodeList=node[1-2] BatchHost=node1 ExitCode=0:0 Command=/x y/job.sh "
)


def test_a_job_as_slurm_shows_it() -> None:
    state = slurm_client.JobState(slurm_client._fields(SHOWN))
    assert (state.id, state.index, state.state, state.restarts, state.ended) == ("12_0", "0", "RUNNING", 2, False)
    assert (state.seconds("RunTime"), state.seconds("TimeLimit")) == (86407, None)
    assert state.fields["JobName"] == "a b"
    assert state.fields["NodeList"] == "node[1-2]"


@pytest.mark.parametrize("text", ["", "0", "1;touch x", "1 2", "-1", "abc", "1_", "1\n2", "99999999999"])
def test_what_is_no_job(text: str) -> None:
    with pytest.raises(UserError, match="is not the number of a job"):
        slurm_client.checked_id(text)


def test_numbers_of_jobs() -> None:
    assert [slurm_client.checked_id(text) for text in ("1", "1234567", "12_0")] == ["1", "1234567", "12_0"]


@pytest.mark.parametrize("command", ["status", "logs", "stop", "resume"])
def test_a_folder_without_a_job(command: str, launch: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code, _, err = launch("run", command=command)
    assert code == 2
    assert "run is not the folder of a run that SLURM was given" in err
    (tmp_path / "run" / "slurm").mkdir()
    (tmp_path / "run" / "slurm" / "job.sh").touch()
    assert "no job was submitted" in launch("run", command=command)[2]
    (tmp_path / "run" / "slurm" / "jobs").write_text("1;touch\n")
    assert "is not the number of a job" in launch("run", command=command)[2]


def test_tasks_that_slurm_has_forgotten(tmp_path: Path) -> None:
    def known(*indices: str) -> list[slurm_client.JobState]:
        return [slurm_client.JobState({"JobId": "1", "ArrayTaskId": index}) for index in indices]

    assert jobs._forgotten(tmp_path, []) == [tmp_path]
    assert jobs._forgotten(tmp_path, known("")) == []
    for name in ("0", "1", "slurm"):
        (tmp_path / name).mkdir()
    assert jobs._forgotten(tmp_path, known("1")) == [tmp_path / "0"]
    assert jobs._forgotten(tmp_path, known("0-1")) == []


def test_the_lines_of_a_log() -> None:
    texts = {"0: [rank 3] step 1": ("0", "3"), "12: W1128 torch": ("12", None), " 3: x": ("3", None)}
    for text, expected in texts.items():
        match = jobs._LABEL.match(text)
        assert match
        assert match.groups() == expected
    assert jobs._LABEL.match("srun: error") is None


# The login node's Python


def test_an_old_python_is_enough() -> None:
    """By what each feature and name needs, and where there is one, by Python 3.9 itself."""
    vermin = [str(Path(sys.executable).with_name("vermin")), "--target=3.9-", "--no-tips", "launch"]
    done = subprocess.run(vermin, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Minimum required versions:.*3\.\d", done.stdout)


@pytest.mark.parametrize("words", ["--help", "slurm --help", "run --help", "status --help", "config --processes 2"])
def test_python_3_9_itself(words: str) -> None:
    found = [shutil.which("python3.9"), *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python3"))]
    works = [
        python for python in found if python and not subprocess.run([python, "-V"], capture_output=True).returncode
    ]
    if not works:
        pytest.skip("there is no Python 3.9")
    done = subprocess.run([works[0], "-m", "launch", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
