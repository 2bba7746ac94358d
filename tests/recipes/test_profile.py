"""A profile of a real run: the trace opens, the table adds up, and what is slow is found."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import toolkit.session
from recipes import bert_cls
from tests.ranks import on_ranks
from tests.recipes.launching import ROOT, environment, recipe, start
from toolkit.tasks import Batch, Classification, text_targets

PHASES = {f"toolkit::{name}" for name in ("step", "data", "forward", "backward", "update", "log", "checkpoint")}
SLOW = 0.1
"""Seconds that a slow loader needs for a micro-batch."""


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def figures(folder: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines]


def names_in(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"}


def shares(report: Mapping[str, Any]) -> dict[str, float]:
    return {row["part"]: row["share"] for row in report["profile"]["parts"]}


class _SlowTask(Classification):
    """Its loader sleeps on the ranks in `slow`, or on all where that is empty."""

    slow: tuple[str, ...] = ()

    def collate(self, rows: Mapping[str, Sequence[Any]], empty: bool) -> Batch:
        if not self.slow or os.environ["RANK"] in self.slow:
            time.sleep(SLOW)
        return super().collate(rows, empty)


class _SlowOnOne(_SlowTask):
    slow = ("1",)


def slow_loader(config: Any) -> None:
    text_targets.Classification = _SlowTask  # type: ignore[misc]
    bert_cls.main(config)


def slow_loader_on_one(config: Any) -> None:
    text_targets.Classification = _SlowOnOne  # type: ignore[misc]
    bert_cls.main(config)


def fails(config: Any) -> None:
    """A defect in the middle of the trace."""

    class Session(toolkit.session.Session):
        def train_step(self, step: Any) -> Any:
            if step.number == 6:
                raise AttributeError("a defect")
            return super().train_step(step)

    bert_cls.Session = Session  # type: ignore[misc]
    bert_cls.main(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profiled_run_computes_the_same(ranks: int, tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--checkpoint.every", "5", "--model.dropout", "0.1"]
    for name, more in (("plain", []), ("profiled", ["--run.profile", "4"])):
        for code, text in on_ranks(recipe, ranks, [*options, *more, "--run.dir", name], str(tmp_path)):
            assert code == 0, text
    assert figures(tmp_path / "profiled") == figures(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "profiled"
    profile = read_report(folder)["profile"]
    assert (profile["first_step"], profile["steps"], profile["ranks"]) == (4, 4, ranks)
    assert sum(row["seconds"] for row in profile["parts"]) == pytest.approx(profile["seconds"], rel=1e-3)
    parts = shares(read_report(folder))
    assert min(parts["compute"], parts["data"], parts["host"], parts["checkpoint"]) > 0
    assert (parts["communication"] > 0) is (ranks > 1)
    traces = sorted((folder / "profile" / "attempt1").iterdir())
    assert [trace.name for trace in traces] == [f"rank{rank}.json.gz" for rank in range(ranks)]
    for trace in traces:
        names = names_in(trace)
        assert names >= PHASES
        assert {"c10d::allreduce_", "gloo:all_reduce", "DistributedDataParallel.forward"} <= names or ranks == 1
    assert "where the time goes" in text or ranks == 2  # the text of the last rank, which is silent there
    page = (folder / "report.html").read_text()
    assert "Where the time goes" in page
    assert profile["advice"] in page


def test_a_loader_that_sleeps_is_found(tiny_job: list[str], tmp_path: Path) -> None:
    """And the parts add up to the time that the run's own clock shows."""
    options = [*tiny_job, "--run.profile", "5", "--run.dir", "run"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path), slow_loader)[0]
    assert code == 0, text
    report = read_report(tmp_path / "run")
    parts = shares(report)
    assert max(parts, key=lambda part: parts[part]) == "data"
    assert SLOW < report["profile"]["parts"][4]["seconds"] < 1.5 * SLOW
    assert f"Waiting for data takes {100 * parts['data']:.0f} % of a step: raise --data.workers." in text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clock = sum(12 / line["samples_per_second"] for line in lines[3:8]) / 5  # of steps 4 to 8
    assert sum(row["seconds"] for row in report["profile"]["parts"]) == pytest.approx(
        clock, rel=0.1
    )  # which ends at the log


def test_who_waits_for_a_slow_loader(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--run.profile", "5", "--run.dir", "run"]
    (code, text), _ = on_ranks(recipe, 2, options, str(tmp_path), slow_loader_on_one)
    assert code == 0, text
    rows = {row["part"]: row for row in read_report(tmp_path / "run")["profile"]["parts"]}
    assert rows["data"]["most"] > SLOW > 2 * rows["data"]["least"]
    assert rows["waiting"]["most"] > 0.7 * SLOW > 2 * rows["waiting"]["least"]


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_sharded_weights_are_communication(strategy: str, tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--strategy.name", strategy, "--run.profile", "3", "--run.dir", "run"]
    (code, text), _ = on_ranks(recipe, 2, options, str(tmp_path))
    assert code == 0, text
    report = read_report(tmp_path / "run")
    assert sum(shares(report).values()) == pytest.approx(1, abs=1e-3)
    assert shares(report)["communication"] > 0.02
    assert {"c10d::_allgather_base_", "gloo:all_gather"} <= names_in(
        tmp_path / report["profile"]["traces"] / "rank1.json.gz"
    )


def test_an_evaluation_ends_the_trace(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--run.profile", "50", "--run.eval_every", "5", "--run.dir", "run"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path))[0]
    assert code == 0, text
    assert (read_report(tmp_path / "run")["profile"]["steps"], "steps 4 to 5" in text) == (2, True)


def test_a_run_that_is_too_short_is_refused(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--train.steps", "3", "--run.profile", "5", "--run.dir", "run"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path))[0]
    assert code == 2
    assert "--run.profile 5" in text
    assert not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tiny_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    options = [*tiny_job, "--run.profile", "3", "--run.dir", "run"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path), in_the_way)[0]
    assert code == 0, text
    assert "there is no profile" in " ".join(text.split())
    assert "profile" not in read_report(tmp_path / "run")


def in_the_way(config: Any) -> None:
    """A file stands where the folder of the traces would be."""

    class Session(toolkit.session.Session):
        def train_step(self, step: Any) -> Any:
            if step.number == 1:
                (self.folder.path / "profile").write_text("")
            return super().train_step(step)

    bert_cls.Session = Session  # type: ignore[misc]
    bert_cls.main(config)


@pytest.mark.slow
def test_a_defect_while_tracing_ends_the_run_as_it_would_have(tiny_job: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from tests.recipes.launching import recipe; from tests.recipes import test_profile; "
        f"code, text = recipe(sys.argv[1:], {str(tmp_path)!r}, test_profile.fails); print(text); sys.exit(code)"
    )
    options = [*tiny_job, "--run.profile", "10", "--run.dir", "run"]
    command = [sys.executable, "-c", code, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a defect" in done.stdout + done.stderr
    report = read_report(tmp_path / "run")
    assert (report["status"], report["steps"]) == ("failed", 5)
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu1", "cpu2"])
def test_a_signal_while_tracing(config: str, tiny_job: list[str], tmp_path: Path) -> None:
    """The trace so far is kept, the run goes on, and its next attempt has a trace of its own."""
    options = [*tiny_job, "--train.steps", "400", "--run.profile", "300", "--run.eval_every", "400", "--run.dir", "run"]
    process = start(options, config=config, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 8):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    report = read_report(tmp_path / "run")
    assert report["status"] == "interrupted", out
    assert "profile" not in report
    ranks = int(config[-1])
    first = {path: path.read_bytes() for path in (tmp_path / "run" / "profile" / "attempt1").iterdir()}
    assert len(first) == ranks
    assert all("toolkit::forward" in names_in(trace) for trace in first)

    more = ["--run.profile", "3"]  # may differ without a word
    for code, text in on_ranks(recipe, ranks, [*options, *more], str(tmp_path)):
        assert code == 0, text
    report = read_report(tmp_path / "run")
    assert report["status"] == "finished"
    assert report["profile"]["first_step"] > 8
    assert len(list((tmp_path / "run" / "profile" / "attempt2").iterdir())) == ranks
    assert {path: path.read_bytes() for path in first} == first
