"""Foresee which item a user takes next, from those before it: films, articles, songs.

$ accelerate launch recipes/recommend.py
$ accelerate launch recipes/recommend.py --data.name plays.csv --data.user listener --data.item song \
    --data.timestamp played_at --data.exclude_seen False
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.compute import fuse_loss
from toolkit.config import (
    CheckpointConfig,
    EventsConfig,
    NextItemNetworkConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data.tables import events
from toolkit.data.tables.summary import example_history, plan_of_events, report_of_events
from toolkit.models import width
from toolkit.networks.next_item import next_item_network
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import NextItem


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: NextItemNetworkConfig = NextItemNetworkConfig()
    data: EventsConfig = EventsConfig()
    train: TrainConfig = TrainConfig(epochs=20, global_batch=64, eval_batch=256)
    optim: OptimConfig = OptimConfig(lr=3e-3, schedule="cosine", weight_decay=0.01)
    precision: Precision = "fp32"
    """Number format of forward and backward. In another, scores of many items round to the same, and their ranks are
    worse for it."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("recommend", config, micro_batch=128) as session:
        data = events(config.data)
        model = next_item_network(config.model, len(data.catalogue.items), config.data.max_length, seed=config.run.seed)
        whole_logits = fuse_loss(model)  # or, where that changes nothing, a loss that needs none
        task = NextItem(data.catalogue, fused=not whole_logits)

        options = {"workers": config.data.workers, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": "causal Transformer", "logits": whole_logits or "never whole"}
        plan = {"model": network, "data": plan_of_events(data, config.data)}
        session.setup(model, tokenizer=data.catalogue, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_events(data))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.compare(after, {"popularity": after["popularity"]})
        session.finish(before=before, test=after, predict=example_history(data))


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
