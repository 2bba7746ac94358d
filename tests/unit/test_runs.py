"""Which folder a command line means."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.bert_cls import Config
from toolkit import runs
from toolkit.config import to_yaml
from toolkit.errors import CheckpointError, ConfigError, LaunchError
from toolkit.runs import FREE, SAFE, Finished, Run, find_run, lock, open_folder

FINISHED = {"status": "finished"}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def begun(path: Path, config: Config, report: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    if report:
        (path / "report.json").write_text(json.dumps(report))
    return path


def test_nothing_there_is_a_new_run() -> None:
    assert find_run("r", Config()) == Run(None)
    assert find_run("r", changed(Config(), run={"name": "x"})) == Run(Path("runs/r/x"))
    assert open_folder("r", Run(None)) == Path("runs/r/001")
    assert open_folder("r", Run(None)) == Path("runs/r/002")


def test_the_same_command_goes_on_with_its_run_whatever_began_since() -> None:
    config = Config()
    begun(Path("runs/r/001"), config)
    begun(Path("runs/r/002"), changed(config, optim={"lr": 1e-3}))
    assert find_run("r", config) == Run(Path("runs/r/001"), True)
    assert find_run("r", changed(config, optim={"lr": 1e-3})) == Run(Path("runs/r/002"), True)
    assert find_run("r", changed(config, optim={"lr": 1e-2})) == Run(None)
    assert find_run("r", changed(config, checkpoint={"resume": "never"})) == Run(None)


def test_a_finished_run_says_so_and_more_steps_go_on_with_it() -> None:
    config = changed(Config(), run={"name": "x"}, train={"steps": 5})
    begun(Path("runs/r/x"), config, FINISHED)
    with pytest.raises(Finished):
        find_run("r", config)
    longer = changed(config, train={"steps": 9}, checkpoint={"allow_change": ("train.steps",)})
    assert find_run("r", longer) == Run(Path("runs/r/x"), True, {"train.steps": (5, 9)})


def test_other_settings_are_refused_key_by_key() -> None:
    config = changed(Config(), run={"name": "x"})
    begun(Path("runs/r/x"), config)
    other = changed(config, optim={"lr": 1e-3, "weight_decay": 0.1})
    with pytest.raises(CheckpointError) as refused:
        find_run("r", other)
    assert "optim.lr: 0.0001 there, 0.001 now" in str(refused.value)
    assert "optim.weight_decay: 0.01 there, 0.1 now" in str(refused.value)
    assert "--checkpoint.allow_change optim.lr optim.weight_decay" in str(refused.value)
    allowed = changed(other, checkpoint={"allow_change": ("optim",)})
    assert find_run("r", allowed).changes == {"optim.lr": (1e-4, 1e-3), "optim.weight_decay": (0.01, 0.1)}


def test_the_script_of_a_job_is_no_other_file() -> None:
    config = changed(Config(), run={"name": "x"})
    Path("runs/r/x/slurm").mkdir(parents=True)
    Path("runs/r/x/slurm/job.sh").touch()
    Path("runs/r/x/.lock").touch()
    assert find_run("r", config) == Run(Path("runs/r/x"))
    Path("runs/r/x/notes").touch()
    with pytest.raises(CheckpointError, match="holds other files"):
        find_run("r", config)


def test_a_change_that_makes_another_run_cannot_be_allowed() -> None:
    config = changed(Config(), run={"name": "x"})
    begun(Path("runs/r/x"), config)
    other = changed(config, train={"global_batch": 64})
    with pytest.raises(CheckpointError) as refused:
        find_run("r", other)
    assert "allow_change" not in str(refused.value)
    with pytest.raises(ConfigError, match="another run"):
        find_run("r", changed(other, checkpoint={"allow_change": ("train.global_batch",)}))
    with pytest.raises(ConfigError, match="Did you mean 'train.steps'"):
        find_run("r", changed(other, checkpoint={"allow_change": ("train.step",)}))


def test_what_changes_no_number_may_always_differ() -> None:
    config = changed(Config(), run={"name": "x"})
    begun(Path("runs/r/x"), config)
    other = changed(config, run={"log_every": 3, "debug": True}, data={"workers": 2}, checkpoint={"keep": 5})
    assert find_run("r", other) == Run(Path("runs/r/x"), True)


def test_every_key_that_may_change_exists() -> None:
    keys = dict(runs._flat(runs.plain(Config())))
    sections = {key.partition(".")[0] for key in keys}
    assert len(FREE) > 5
    assert {key for key in FREE + SAFE if key not in keys and key not in sections} == set()


def test_a_key_that_is_younger_than_the_run_has_had_its_default() -> None:
    config = changed(Config(), run={"name": "x"})
    path = begun(Path("runs/r/x"), config)
    lines = path.joinpath("config.yaml").read_text().splitlines()
    path.joinpath("config.yaml").write_text("\n".join(line for line in lines if "label_smoothing" not in line))
    assert find_run("r", config).known
    with pytest.raises(CheckpointError, match=r"label_smoothing: 0\.0 there"):
        find_run("r", changed(config, train={"label_smoothing": 0.1}))


def test_folders_that_are_no_runs() -> None:
    Path("file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        find_run("r", changed(Config(), run={"dir": Path("file")}))
    Path("other").mkdir()
    assert find_run("r", changed(Config(), run={"dir": Path("other")})) == Run(Path("other"))
    Path("other/notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="no run"):
        find_run("r", changed(Config(), run={"dir": Path("other")}))
    with pytest.raises(ConfigError, match="beside --run.dir"):
        find_run("r", changed(Config(), run={"dir": Path("new"), "name": "x"}))
    Path("runs/r/001").mkdir(parents=True)
    Path("runs/r/001/config.yaml").write_text("{")
    assert find_run("r", Config()) == Run(None)


def test_never_and_must() -> None:
    config = changed(Config(), run={"name": "x"})
    with pytest.raises(CheckpointError, match="no run to go on with"):
        find_run("r", changed(config, checkpoint={"resume": "must"}))
    begun(Path("runs/r/x"), config)
    assert find_run("r", changed(config, checkpoint={"resume": "must"})).known
    with pytest.raises(CheckpointError, match="resume is never"):
        find_run("r", changed(config, checkpoint={"resume": "never"}))


@pytest.mark.parametrize("name", ["../out", "a/b", "/abs", "..", "."])
def test_a_name_stays_within_the_runs_of_its_recipe(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        find_run("r", changed(Config(), run={"name": name}))


def _hold(folder: str, ready: Any) -> None:
    held = lock(Path(folder))
    ready.set()
    time.sleep(60)
    held.release()


def test_two_processes_do_not_write_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), ready), daemon=True)
    other.start()
    assert ready.wait(30)
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.5)
    with pytest.raises(LaunchError, match="another process"):
        lock(tmp_path)
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    lock(tmp_path).release()  # a kill frees it
