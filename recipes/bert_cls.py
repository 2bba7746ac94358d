"""Fine-tune an encoder to put texts, or pairs of them, into classes; to give them several labels, or numbers.

$ accelerate launch recipes/bert_cls.py
$ accelerate launch recipes/bert_cls.py --data.name reviews.csv --data.text review --data.label stars
$ accelerate launch recipes/bert_cls.py --config configs/bert_cls/boolq.yaml
$ accelerate launch recipes/bert_cls.py --config configs/bert_cls/snippets.yaml
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters import add_adapter
from toolkit.config import (
    AdapterConfig,
    CheckpointConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Quantization,
    RunConfig,
    StrategyConfig,
    TextAugmentConfig,
    TextDataConfig,
    TrainConfig,
)
from toolkit.data import labelled_texts
from toolkit.data.summary import majority, plan_rows, predict_example, report_facts
from toolkit.data.text_augment import text_augmentation
from toolkit.models import input_limits, load_classifier, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import PROBLEMS, text_task


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: TextDataConfig = TextDataConfig()
    augment: TextAugmentConfig = TextAugmentConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("bert_cls", config) as session:
        tokenizer = load_tokenizer(config.model)
        data = labelled_texts(config.data, tokenizer)
        problem = PROBLEMS[config.data.target]
        model = load_classifier(config.model, data.labels, seed=config.run.seed, problem=problem)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        limits = input_limits(model, config.data.max_length)
        vary = text_augmentation(
            config.augment,
            tokenizer,
            data.train,
            seed=config.run.seed,
            limits=limits,
            classes=len(data.labels) if config.data.target == "class" else 0,
            steps=config.data.normalise,
            pairs=config.data.text_pair is not None,
        )
        task = text_task(config.data.target, data, tokenizer, config.train.label_smoothing, **vary, **limits)

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        plan = {"model": {"name": config.model.name}, "data": plan_rows(data, config.data.max_length)}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(labels=data.labels, data=report_facts(data, config.data.max_length))
        session.console.label_balance(data.facts["samples"])
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after, majority=majority(data), predict=predict_example(config.data))


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
