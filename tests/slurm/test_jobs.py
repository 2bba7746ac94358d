"""Recipes as jobs of a real SLURM with several nodes: what happens to them there, and that it changes no number.

Each job trains a tiny model whose steps have a pause. Its reference is the same run on forked ranks, never interrupted.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.jobs import Reference, curve, differences, last_step, report
from tests.recipes.launching import ROOT, environment
from tests.slurm.cluster import Cluster
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60
AWAY = 30.0
"""Seconds without SLURM's controller."""
BOUND = 1e-5
"""Relative, of losses and gradient norms: as the parity of strategies has it."""


class Job:
    """A job that `python -m launch slurm` submitted."""

    def __init__(
        self, cluster: Cluster, run: Path, options: Sequence[str], recipe: Sequence[str], nap: float = 0.1
    ) -> None:
        self.cluster, self.run, self.nap = cluster, run, nap
        own = ["--cpu", "--no-preflight", "--no-check", "--export", "PYTHONPATH", "--export", "NAP"]
        own += ["--run-dir", str(run)]
        script = "tests/slurm/napping.py"
        time_limit = () if "--time" in options else ("--time", "30")
        self.launch("slurm", script, *own, *time_limit, *options, "--", *recipe)

    @property
    def id(self) -> str:
        return (self.run / "slurm" / "jobs").read_text().split()[-1]

    @property
    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "slurm").glob("*.log")))

    def launch(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words],
            cwd=ROOT,
            env=self.cluster.environment() | {"PYTHONPATH": str(ROOT), "NAP": str(self.nap)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def until(self, fact: Callable[[], object], seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < deadline, f"{self.state}\n{self.output}"
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.run) >= step)

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    def finish(self, seconds: float = 240) -> None:
        """Wait for its end, which must be that of the run."""
        self.until(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)
        assert self.state == "COMPLETED", self.output
        assert report(self.run)["status"] == "finished"

    def ends(self) -> list[str]:
        """How the attempts of the run ended."""
        return [attempt.status for attempt in Attempts(self.run).read()]


Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """Submits jobs of which nothing outlives the test."""
    jobs: list[Job] = []

    def one(options: Sequence[str], recipe: Sequence[str], name: str = "run", nap: float = 0.1) -> Job:
        jobs.append(Job(cluster, tmp_path / name, options, recipe, nap))
        return jobs[-1]

    yield one
    for job in jobs:
        cluster.call("scancel", job.id, check=False)
    cluster.until(lambda: all(job.state not in ("RUNNING", "COMPLETING") for job in jobs), 60, "jobs to end")


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, texts_csv: Path, tiny_model: Path) -> Job:
    """A job whose time is over while the other tests run, so that nobody waits for it."""
    options = ["--time", "3", "--signal-lead", "60", "--name", "limited", "--sbatch=--exclude=node[2-3]"]
    recipe = ["--model.name", str(tiny_model), "--model.init", "random", "--data.name", str(texts_csv)]
    recipe += ["--train.global_batch", "12", "--train.steps", "1500", "--precision", "fp32", "--run.eval_every", "500"]
    return Job(cluster, tmp_path_factory.mktemp("limited") / "run", options, recipe)


@pytest.fixture
def job(tiny_job: list[str], limited: Job) -> list[str]:
    return [*tiny_job, "--train.steps", str(STEPS), "--checkpoint.every", "10", "--run.eval_every", "30"]


TWO_BY_TWO = ["--nodes", "2", "--processes", "2"]


def near_one_process(run: Path, alone: Path) -> None:
    ours, theirs = curve(run), curve(alone)
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    assert [line[3:] for line in ours] == [line[3:] for line in theirs]  # learning rate, units, samples
    for place in (1, 2):
        assert [line[place] for line in ours] == pytest.approx([line[place] for line in theirs], rel=BOUND)


def test_a_signal_then_a_stop_then_fewer_nodes(submit: Submit, job: list[str], reference: Reference) -> None:
    one = submit([*TWO_BY_TWO, "--name", "ddp"], job)
    one.until_step(12)
    one.cluster.call("scancel", "--batch", "--signal=USR1", one.id)
    one.until(lambda: one.ends() == ["interrupted", "killed"])  # the second one has no end yet
    one.until_step(Attempts(one.run).read()[1].from_step + 8)
    assert f"job         {one.id}: running" in (said := one.launch("status", str(one.run))), said
    assert "queued again once" in said
    assert "asked to save and end" in one.launch("stop", str(one.run))
    assert one.state == "FAILED"  # with 75: it has more to do, and was asked not to
    stopped = last_step(one.run)
    assert one.ends() == ["interrupted"] * 2
    assert curve(one.run) == curve(reference(job, 4))[:stopped]
    assert f"step        {stopped} of {STEPS}" in one.launch("status", str(one.run), code=1)

    first = one.id
    assert one.launch("resume", str(one.run), "--nodes", "1").startswith("job ")
    assert one.id != first
    assert "End it first" in one.launch("resume", str(one.run), code=2)
    one.finish()
    attempts = Attempts(one.run).read()
    assert [attempt.facts["ranks"] for attempt in attempts] == [4, 4, 2]
    assert [attempt.ended_at for attempt in attempts[:-1]] == [attempt.from_step for attempt in attempts[1:]]
    near_one_process(one.run, reference(job, 1))
    lines = one.launch("logs", str(one.run), "--rank", "0").splitlines()
    assert any(f"step {STEPS}/{STEPS}" in line for line in lines)
    assert all(line.startswith("0: [rank 0] ") for line in lines)


def test_queued_again_in_the_middle_of_a_save(submit: Submit, job: list[str], reference: Reference) -> None:
    options = [*job, "--checkpoint.every", "1"]
    one = submit([*TWO_BY_TWO, "--strategy", "hybrid"], options)
    one.until_step(10)
    one.until(lambda: Store(one.run).unfinished())
    one.cluster.call("scontrol", "requeue", one.id)
    one.finish()
    assert one.ends()[1:] == ["finished"]
    shards = ["--strategy.name", "fsdp", "--strategy.shard_size", "2"]
    assert differences(one.run, reference([*options, *shards], 4)) == []
    near_one_process(one.run, reference(options, 1))


def test_a_node_dies(submit: Submit, job: list[str], reference: Reference) -> None:
    one = submit([*TWO_BY_TWO, "--strategy", "zero3"], job, nap=0.8)
    one.until_step(10)
    with one.cluster.without_controller():
        before, ends = last_step(one.run), time.monotonic() + AWAY
        one.until_step(before + 5)  # a run does not need it
        time.sleep(max(0, ends - time.monotonic()))
    assert one.state == "RUNNING"
    assert last_step(one.run) < STEPS
    one.cluster.power_off("node2")
    try:
        one.finish()
        assert "node[1,3], queued again once" in one.launch("status", str(one.run))
    finally:
        one.cluster.power_on("node2")
    assert one.ends()[1:] == ["finished"]
    assert differences(one.run, reference([*job, "--strategy.name", "zero3"], 4)) == []
    near_one_process(one.run, reference(job, 1))


def test_a_node_that_was_given_up_comes_back(submit: Submit, job: list[str], reference: Reference) -> None:
    one = submit(["--processes", "1", "--sbatch=--exclude=node1"], job)
    one.until_step(12)
    one.cluster.freeze("node2")  # where SLURM has put it
    try:
        one.finish()
        before = {path: path.read_bytes() for path in one.run.rglob("*") if path.is_file() and path.suffix != ".log"}
        assert "node3" in one.launch("status", str(one.run))
        assert "napping.py" in one.cluster.on("node2", "ps", "axww")
        one.cluster.thaw("node2")
        one.until(lambda: "napping.py" not in one.cluster.on("node2", "ps", "axww"), 60)
        after = {path: path.read_bytes() for path in one.run.rglob("*") if path.is_file() and path.suffix != ".log"}
        assert after == before
        assert one.state == "COMPLETED"
    finally:
        one.cluster.power_off("node2")
        one.cluster.power_on("node2")
    assert one.ends() == ["killed", "finished"]
    assert differences(one.run, reference(job, 1)) == []


def test_an_array_of_seeds(submit: Submit, job: list[str], reference: Reference) -> None:
    runs = submit(["--processes", "1", "--array", "1-3"], job)
    runs.until(lambda: last_step(runs.run / "3") >= 5)
    runs.cluster.call("scancel", "--batch", "--signal=USR1", f"{runs.id}_3")

    def ends() -> dict[str, list[str]]:
        return {seed: [attempt.status for attempt in Attempts(runs.run / seed).read()] for seed in ("1", "2", "3")}

    runs.until(lambda: all(statuses[-1:] == ["finished"] for statuses in ends().values()), 200)
    for seed in ("1", "2", "3"):
        assert report(runs.run / seed)["status"] == "finished"
        assert curve(runs.run / seed) == curve(reference([*job, "--run.seed", seed], 1))
    assert len({str(curve(runs.run / seed)) for seed in ("1", "2", "3")}) == 3
    assert ends() == {"1": ["finished"], "2": ["finished"], "3": ["interrupted", "finished"]}
    runs.until(lambda: "running" not in runs.launch("status", str(runs.run)), 30)
    assert runs.launch("status", str(runs.run)).count(": completed") == 3
    assert "has ended already" in runs.launch("stop", str(runs.run))


def test_the_time_limit(limited: Job) -> None:
    """It was asked to save in time, and went on. Here it is stopped, for it has many steps to take."""
    limited.until(lambda: len(limited.ends()) > 1, 400)
    first, second = Attempts(limited.run).read()[:2]
    assert (first.status, first.ended_at) == ("interrupted", second.from_step)
    assert "stopped and saved: queued again" in limited.output
    limited.launch("stop", str(limited.run))


# What SLURM, or the job itself, refuses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--partition", "nowhere"], "SLURM says: sbatch: error: invalid partition specified: nowhere"),
        (["--sbatch=--mem=900G"], "SLURM says: sbatch: error: Memory specification can not be satisfied"),
        (["--dependency", "afterok:1;touch x"], "is not the number of a job"),
    ],
)
def test_what_is_refused(options: list[str], said: str, cluster: Cluster, tmp_path: Path) -> None:
    words = ["slurm", "recipes/bert_cls.py", "--cpu", "--time", "9", "--no-check", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, *options],
        cwd=ROOT,
        env=cluster.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_nodes_do_not_share(cluster: Cluster, tmp_path: Path, job: list[str]) -> None:
    run = tmp_path / "run"
    one = Job(cluster, run, ["--nodes", "2", "--sbatch=--exclude=node3"], job)
    cluster.call("scancel", one.id)
    script = (run / "slurm" / "job.sh").read_text().replace(f"\nrun={run}\n", "\nrun=/dev/shm/run\n")
    (run / "slurm" / "job.sh").write_text(script)
    cluster.until(lambda: one.state == "CANCELLED", 20, "its end")
    one.launch("resume", str(run))
    one.until(lambda: one.state == "FAILED", 30)
    assert "not every node sees /dev/shm/run: it must lie on a file system that they share" in one.output


def test_gpus_come_from_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """The pretended GPUs are counted; the recipe then finds none on this machine."""
    words = ["slurm", "recipes/bert_cls.py", "--gpus", "2", "--time", "9", "--dry-run", "--no-preflight"]
    script = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    fewer = script.replace("#SBATCH --gpus-per-node=2", "#SBATCH --gpus-per-node=1")
    (tmp_path / "job.sh").write_text(fewer)
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    job = cluster.call("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    cluster.until(lambda: cluster.state(job) == "FAILED", 30, "its end")
    said = (tmp_path / "run" / "slurm" / f"{job}.log").read_text()
    assert "2 GPUs on each node were asked for, and 1 are there" in said
