"""Fine-tune an encoder to tag the words of a text: names of people, places and organisations, or of your own kinds.

$ accelerate launch recipes/token_cls.py
$ accelerate launch recipes/token_cls.py --config configs/token_cls/chinese.yaml
$ accelerate launch recipes/token_cls.py --data.name train.conll --data.validation dev.conll --data.test test.conll
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
    TagsConfig,
    TrainConfig,
)
from toolkit.data import tag_labels, tagged_tokens, token_tags
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.models import input_limits, load_classifier, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import TokenClassification


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: TagsConfig = TagsConfig()
    train: TrainConfig = TrainConfig(epochs=1)
    optim: OptimConfig = OptimConfig(lr=3e-4)
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("token_cls", config) as session:
        tokenizer = load_tokenizer(config.model)
        corpus = tagged_tokens(config.data)
        labels = tag_labels(corpus)
        data = token_tags(config.data, corpus, labels, tokenizer)
        model = load_classifier(config.model, labels, seed=config.run.seed, of="tokens")
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        limits = input_limits(model, config.data.max_length)
        task = TokenClassification(labels, tokenizer, config.train.label_smoothing, **limits)

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": config.model.name, "tags": f"O, and B and I of {', '.join(task.kinds)}"}
        session.setup(
            model,
            tokenizer=tokenizer,
            data_fingerprint=data.fingerprint,
            plan={"model": network, "data": plan_of_examples(data)},
        )
        session.describe(labels=labels, data=report_of_examples(data, config.data.max_length))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
