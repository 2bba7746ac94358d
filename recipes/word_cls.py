"""Put texts into classes by the mean of their word vectors: with vectors of others, and beside it with random ones.

$ accelerate launch recipes/word_cls.py
$ accelerate launch recipes/word_cls.py --model.name matrices/words --data.name reviews.csv
$ accelerate launch recipes/word_cls.py --model.embedding frozen
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.config import (
    CheckpointConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StrategyConfig,
    TextDataConfig,
    TrainConfig,
    WordModelConfig,
)
from toolkit.data import text_classification
from toolkit.data.summary import majority, plan_rows, report_facts
from toolkit.embeddings import word_vectors
from toolkit.rival import train_rival
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import Classification
from toolkit.word_classifier import load_word_classifier


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: WordModelConfig = WordModelConfig()
    data: TextDataConfig = TextDataConfig(name="sample:sarcasm", train_samples=4000, test_samples=4000)
    train: TrainConfig = TrainConfig(epochs=4)
    optim: OptimConfig = OptimConfig(lr=1e-3)
    precision: Precision = "fp32"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("word_cls", config) as session:
        tokenizer, vectors = word_vectors(config.model.name)
        data = text_classification(config.data, tokenizer)
        transferred, drawn = (
            load_word_classifier(config.model, tokenizer, vectors, data.labels, seed=config.run.seed, random=random)
            for random in (False, True)
        )
        task = Classification(
            data.labels,
            tokenizer,
            config.train.label_smoothing,
            vocabulary=len(vectors),
            positions=config.data.max_length,
        )

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        plan = {
            "model": {"name": config.model.name, "vectors": f"{len(vectors):,} × {vectors.shape[1]}"},
            "data": plan_rows(data, config.data.max_length),
        }
        session.setup(transferred, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(labels=data.labels, data=report_facts(data, config.data.max_length))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        random = train_rival(session, drawn, task, train, test, title="random")
        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.compare(after, {"random vectors": random})
        gain = after["accuracy"] - random["accuracy"]
        session.describe(gain=gain)
        session.console.note(f"accuracy gained by the transferred vectors: {gain:+.4f}")
        session.finish(before=before, test=after, majority=majority(data))


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
