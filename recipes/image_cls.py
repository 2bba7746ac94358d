"""Train a network to put images into classes.

$ accelerate launch recipes/image_cls.py
$ accelerate launch recipes/image_cls.py --data.name photos/ --model.name sample:efficientnet-lite0
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config import (
    AugmentConfig,
    CheckpointConfig,
    ImageDataConfig,
    ImageModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data.images import (
    image_classification,
    majority_of_images,
    plan_of_images,
    report_of_images,
    show_mistakes,
)
from toolkit.image_models import image_input, load_image_classifier
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import ImageClassification


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ImageModelConfig = ImageModelConfig()
    data: ImageDataConfig = ImageDataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig(epochs=12, global_batch=64, eval_batch=250)
    optim: OptimConfig = OptimConfig(lr=4e-3, weight_decay=0.05, schedule="cosine")
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("image_cls", config) as session:
        wanted = image_input(config.model)
        data = image_classification(config.data, wanted)
        model = load_image_classifier(config.model, data.labels, data.processor, seed=config.run.seed)
        varied = {"seed": config.run.seed, "label_smoothing": config.train.label_smoothing}
        task = ImageClassification(data, config.augment, **varied)

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        name = config.model.name or f"a new {config.model.network}"
        plan = {"model": {"name": name}, "data": plan_of_images(data, config.augment)}
        session.setup(model, tokenizer=data.processor, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(labels=data.labels, data=report_of_images(data))
        session.console.label_balance(data.facts["samples"])
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.describe(mistakes=show_mistakes(data, after))
        session.finish(before=before, test=after, majority=majority_of_images(data), predict="IMAGE.png")


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
