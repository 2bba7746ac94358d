"""What a session refuses, and when it evaluates; the rest of its life is tested with the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.bert_cls import Config
from tests.parity.job import Recording, tiny_data
from toolkit.config import RunConfig, TrainConfig
from toolkit.errors import CheckpointError, ConfigError
from toolkit.session import Session


class Unsmoothed(Recording):
    """A task whose loss does not read label smoothing."""

    smooths_labels = False


def test_label_smoothing_is_refused_on_a_task_that_does_not_read_it() -> None:
    session = Session("bert_cls", Config(train=TrainConfig(label_smoothing=0.1, steps=2)))
    data = tiny_data()
    with pytest.raises(ConfigError, match=r"--train.label_smoothing has no effect on the task Unsmoothed"):
        session.loaders(Unsmoothed(), data, data, data)
    session.loaders(Recording(), data, data, data)


@pytest.mark.parametrize(
    ("train", "run", "due"),
    [
        (TrainConfig(epochs=2, global_batch=24), RunConfig(), [3, 6]),
        (TrainConfig(epochs=1.5, global_batch=24), RunConfig(), [3, 5]),
        (TrainConfig(steps=7, global_batch=24), RunConfig(eval_every=2), [2, 4, 6]),
        (TrainConfig(steps=2, global_batch=24), RunConfig(), [2]),
    ],
)
def test_when_to_evaluate(train: TrainConfig, run: RunConfig, due: list[int]) -> None:
    session, data = Session("bert_cls", Config(train=train, run=run)), tiny_data()
    session.loaders(Recording(), data, data, data)
    assert [step for step in range(1, session.total_steps + 1) if session.evaluation_due(step)] == due


def test_folders_that_cannot_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        Session("bert_cls", Config(run=RunConfig(dir=tmp_path / "file")))
    (tmp_path / "empty").mkdir()
    Session("bert_cls", Config(run=RunConfig(dir=tmp_path / "empty")))
