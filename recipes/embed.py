"""Teach an encoder which texts belong together: sentence embeddings, by contrast with all other texts of a batch.

$ accelerate launch recipes/embed.py
$ accelerate launch recipes/embed.py --data.name pairs.jsonl --data.pair columns
$ accelerate launch recipes/embed.py --data.name articles.jsonl --data.pair headline
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config import (
    AnchorsConfig,
    CheckpointConfig,
    ContrastConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data import anchored_texts, encoded_anchors
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.encoders import load_encoder
from toolkit.models import input_limits, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import Contrast


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig()
    data: AnchorsConfig = AnchorsConfig()
    contrast: ContrastConfig = ContrastConfig()
    train: TrainConfig = TrainConfig(epochs=1, global_batch=64)
    optim: OptimConfig = OptimConfig(lr=1e-4)
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("embed", config) as session:
        corpus = anchored_texts(config.data)
        tokenizer = load_tokenizer(config.model)
        data = encoded_anchors(config.data, corpus, tokenizer)
        model = load_encoder(config.model, seed=config.run.seed)
        model.config.pooling = config.contrast.pooling  # for whoever loads what is saved
        limits = input_limits(model, config.data.max_length)
        pooling, temperature = config.contrast.pooling, config.contrast.temperature
        task = Contrast(tokenizer, pooling=pooling, temperature=temperature, **limits)

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        sources = plan_of_examples(data, config.data.max_length)
        plan = {"model": {"name": config.model.name}, "data": sources, "contrast": task.describe()}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_examples(data, config.data.max_length))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after, predict='"A TEXT" "ANOTHER TEXT"')


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
