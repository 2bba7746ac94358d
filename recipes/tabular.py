"""Predict a column of a table from the others: a measurement or a class.

$ accelerate launch recipes/tabular.py
$ accelerate launch recipes/tabular.py --data.name houses.csv --data.target price --data.dates sold --data.drop id
$ accelerate launch recipes/tabular.py --data.folds 5 --data.fold 0
$ accelerate launch recipes/tabular.py --model.architecture ft_transformer --model.hidden_size 64
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toolkit.baselines import table_baselines
from toolkit.config import (
    CheckpointConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StrategyConfig,
    TableConfig,
    TableNetworkConfig,
    TrainConfig,
)
from toolkit.data.tables import table
from toolkit.data.tables.summary import example_row, plan_of_table, report_of_table, share_of_majority
from toolkit.networks.tables import table_network
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import table_task


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: TableNetworkConfig = TableNetworkConfig()
    data: TableConfig = TableConfig()
    train: TrainConfig = TrainConfig(epochs=20, global_batch=256, eval_batch=2048)
    optim: OptimConfig = OptimConfig(lr=2e-3, schedule="cosine", weight_decay=0.01)
    precision: Precision = "fp32"
    """Number format of forward and backward. So small a network gains little from another."""
    baselines: Literal["auto", "on", "off"] = "auto"
    """Train a linear model and gradient boosting of scikit-learn on the same rows, to compare with: `auto` does where
    it is installed."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("tabular", config, micro_batch=1024) as session:
        data = table(config.data)
        reading = data.preprocessor
        task = table_task(reading, config.train.label_smoothing)
        sizes = (reading.number_count, reading.category_sizes, len(reading.labels) or 1)
        model = table_network(config.model, *sizes, seed=config.run.seed)

        train, validation, test = session.loaders(
            task, data.train, data.validation, data.test, workers=config.data.workers
        )
        others, note = {}, ""
        if session.world.main:  # before the ranks are connected: the others can wait
            others, note = table_baselines(data, task, config.baselines, seed=config.run.seed)
        plan = {"model": {"name": config.model.architecture}, "data": plan_of_table(data, config.data)}
        session.setup(model, tokenizer=reading, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(labels=reading.labels, data=report_of_table(data))
        session.console.label_balance(data.facts["counts"])
        for warning in [*data.facts["warnings"], *filter(None, [note])]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.compare(after, others)
        session.finish(before=before, test=after, majority=share_of_majority(data), predict=example_row(data))


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
