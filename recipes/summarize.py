"""Summarise: teach a language model to write a headline, or a summary, of a text; whole or with an adapter.

$ accelerate launch recipes/summarize.py
$ accelerate launch recipes/summarize.py --data.name articles.csv --data.source article --data.target summary \
    --data.instruction "Summarise this article in two sentences." --data.max_length 512 --data.max_target_length 128
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import (
    AdapterConfig,
    CheckpointConfig,
    DecodeConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Quantization,
    RunConfig,
    StrategyConfig,
    SummaryConfig,
    TrainConfig,
)
from toolkit.data import answer_end, encode_pairs, text_pairs, use_template
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.decoders import load_decoder
from toolkit.generation import write_as
from toolkit.models import input_limits, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import Answering
from toolkit.text_scores import lead, rouge


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig(name="sample:smollm2")
    adapter: AdapterConfig = AdapterConfig(name="lora")
    data: SummaryConfig = SummaryConfig(validation_share=0.01, test_share=0.03, train_texts=320)
    train: TrainConfig = TrainConfig(epochs=1, global_batch=8, eval_batch=16)
    optim: OptimConfig = OptimConfig(lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine")
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    generate: DecodeConfig = DecodeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("summarize", config) as session:
        corpus = text_pairs(config.data)
        tokenizer = load_tokenizer(config.model, pads=False)
        use_template(tokenizer, None)
        data = encode_pairs(config.data, corpus, tokenizer, asked=config.data.instruction)
        longest = data.facts["longest"]
        model = load_decoder(config.model, tokenizer, longest, seed=config.run.seed)
        write_as(model, tokenizer, config.generate, tokens=config.data.max_target_length, ends={answer_end(tokenizer)})
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        smoothing = config.train.label_smoothing
        whole_logits = "labels are smoothed" if smoothing else fuse_loss(model)  # or a loss that needs none
        fused = not whole_logits
        task = Answering(tokenizer, label_smoothing=smoothing, fused=fused, **input_limits(model, longest))

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": config.model.name, "logits": whole_logits or "never whole"}
        plan = {"model": network, "data": plan_of_examples(data, config.data.max_length)}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_examples(data, config.data.max_length))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        scored = partial(session.score_texts, test, "summarising the test", rouge, show=config.generate.show)
        before = session.baseline(test, "test before training", scored)
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test") | scored()
        session.compare(after, {"lead sentence": rouge([*map(lead, data.test["given"])], data.test["wanted"])})
        session.finish(before=before, test=after, predict='"TEXT" --temperature 0')


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
