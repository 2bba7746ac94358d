"""Fine-tune an encoder to find the answer to a question in a passage.

$ accelerate launch recipes/qa.py
$ accelerate launch recipes/qa.py --data.name questions.jsonl --data.passage context
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
    SpansConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data import answer_spans, answered_questions
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.models import input_limits, load_classifier, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import QuestionAnswering


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: SpansConfig = SpansConfig()
    train: TrainConfig = TrainConfig(epochs=2, global_batch=16, eval_batch=16)
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
    with Session("qa", config) as session:
        tokenizer = load_tokenizer(config.model)
        corpus = answered_questions(config.data)
        data = answer_spans(config.data, corpus, tokenizer)
        model = load_classifier(config.model, ("begins", "ends"), seed=config.run.seed, of="spans")
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        limits = input_limits(model, config.data.max_length)
        task = QuestionAnswering(tokenizer, longest=config.data.answer_tokens, **limits)

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        windows = f"{config.data.max_length} tokens, {config.data.stride} of them in common with the one before"
        session.setup(
            model,
            tokenizer=tokenizer,
            data_fingerprint=data.fingerprint,
            plan={"model": {"name": config.model.name}, "data": plan_of_examples(data) | {"windows": windows}},
        )
        session.describe(data=report_of_examples(data))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        example = f'\'{{"{config.data.question}": "QUESTION", "{config.data.passage}": "TEXT"}}\''
        session.finish(before=before, test=after, predict=example)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
