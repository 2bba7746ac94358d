"""Trackers: what is logged can be read back with the tracker's own reader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.errors import ConfigError
from toolkit.report import RunFolder, Trackers, build_manifest, write_html
from toolkit.report.folder import REDACTED
from toolkit.report.trackers import flatten

CONFIG = {"model": {"name": "sample:minilm", "freeze": ("a", "b"), "dropout": None}, "train": {"epochs": 2}}


CANARY = "cAnArY7f3kQ9zX2mP"


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    # In a run `world()` has made it; accelerate's trackers ask it which rank is the main one.
    made = not PartialState._shared_state
    PartialState(cpu=True)
    yield
    if made:
        PartialState._reset_state()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_is_written_and_read_back(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, "classify_text/3", CONFIG, main=True)
    for step in (1, 2, 3):
        values = {
            "loss": torch.tensor(1 / step),
            "lr": np.float32(0.5),
            "epoch": None,
            "eval": {"accuracy": 0.25 * step},
        }
        trackers.log(values, step)
    trackers.close()
    trackers.log({"loss": 0.0}, 4)
    trackers.close()
    folder = tmp_path / "tensorboard" / "classify_text_3"
    assert scalars(folder, "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars(folder, "lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(folder, "eval.accuracy") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    settings = next(folder.rglob("hparams.yml")).read_text()
    assert "model.name: sample:minilm" in settings
    assert "train.epochs: 2" in settings


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = Trackers(["tensorboard"], tmp_path, "run", CONFIG, main=True)
    for step in range(1, 7):
        first.log({"loss": 1.0}, step)
    first.close()
    second = Trackers(["tensorboard"], tmp_path, "run", CONFIG, main=True, start_step=4)
    for step in (5, 6, 7):
        second.log({"loss": 2.0}, step)
    second.close()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    folder = tmp_path / "tensorboard" / "run"
    assert scalars(folder, "loss") == expected
    assert len(list(folder.rglob("hparams.yml"))) == 1


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    for trackers in (
        Trackers(["tensorboard"], tmp_path, "run", CONFIG, main=False),
        Trackers([], tmp_path, "run", CONFIG, main=True),
    ):
        trackers.log({"loss": 1.0}, 1)
        trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_name_stays_within_the_folder(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path / "run", "../../新闻", {}, main=True)
    trackers.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["_新闻"]


@pytest.mark.parametrize("main", [True, False])
def test_an_unknown_tracker_is_refused_on_every_rank(tmp_path: Path, main: bool) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        Trackers(["tensorbord"], tmp_path, "run", CONFIG, main=main)


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['tensorboard'] = None\n"
        "from pathlib import Path\nfrom toolkit.errors import ConfigError\nfrom toolkit.report import Trackers\n"
        "try:\n    Trackers(['tensorboard'], Path(sys.argv[1]), 'run', {}, main=True)\n"
        "except ConfigError as error:\n    print(error.remedy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install 'largemodel-toolkit[track]'" in done.stdout


def test_a_canary_is_in_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_SECRET_TOKEN", CANARY)
    monkeypatch.setenv("NCCL_COMMENT", f"hf_{CANARY}")
    settings = {"hub": {"token": CANARY}, "note": f"sk-{CANARY}"}
    run = RunFolder(tmp_path)
    run.write_config(f"hub:\n  token: {CANARY}\n  note: hf_{CANARY}\nmodel:\n  name: x\n")
    argv = ["x.py", "--hub.token", CANARY, f"--key={CANARY}", f"ghp_{CANARY}"]
    run.write_manifest(build_manifest(argv, 0, "sha256:1", settings, settings, {"secret": CANARY}))
    run.append_metrics([{"step": 1, "loss": 1.0, "note": f"hf_{CANARY}"}])
    run.write_report({"status": "finished", "predict": f"toolkit predict --token={CANARY}"})
    trackers = Trackers(["tensorboard"], tmp_path, "run", settings, main=True)
    trackers.log({"loss": 1.0, "note": f"hf_{CANARY}"}, step=1)
    trackers.close()
    write_html(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    assert "name: x" in run.read_config()
    assert REDACTED in run.read_manifest()["command"]


def test_flatten_gives_scalars_and_text() -> None:
    values = {"a": {"b": {"c": 1}, "d": None}, "e": (1, 2), "f": np.float64(0.5), "g": True, "h": Path("x")}
    assert flatten(values) == {"a.b.c": 1, "e": "(1, 2)", "f": 0.5, "g": True, "h": "x"}
