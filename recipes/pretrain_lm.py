"""Train a language model on plain text: a new one, or one to go on from.

$ accelerate launch recipes/pretrain_lm.py
$ accelerate launch recipes/pretrain_lm.py --config configs/pretrain_lm/chinese.yaml
$ accelerate launch recipes/pretrain_lm.py --data.name books/*.txt wiki.jsonl --data.weights 0.3 0.7
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import (
    AdapterConfig,
    CheckpointConfig,
    CorpusConfig,
    DecoderConfig,
    GenerateConfig,
    OptimConfig,
    Precision,
    Quantization,
    RunConfig,
    StrategyConfig,
    TokenizerConfig,
    TrainConfig,
)
from toolkit.data import decoder_tokenizer, language, text_corpus
from toolkit.data.summary import plan_of_texts, report_of_texts
from toolkit.decoders import load_decoder
from toolkit.models import input_limits, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import LanguageModeling


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: DecoderConfig = DecoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: CorpusConfig = CorpusConfig()
    train: TrainConfig = TrainConfig(epochs=3, global_batch=16, eval_batch=16)
    optim: OptimConfig = OptimConfig(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", final_share=0.1)
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    generate: GenerateConfig = GenerateConfig(prompts=("The government has", "Shares in the company"))
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("pretrain_lm", config) as session:
        corpus = text_corpus(config.data)
        tokenizer = decoder_tokenizer(config.model, config.tokenizer, corpus)
        data = language(config.data, corpus, tokenizer)
        model = load_decoder(config.model, tokenizer, config.data.max_length, seed=config.run.seed)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        whole_logits = fuse_loss(model)  # or, where that changes nothing, a loss that needs none
        task = LanguageModeling(tokenizer, fused=not whole_logits, **input_limits(model, config.data.max_length))

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {
            "name": config.model.name or f"a new {config.model.architecture}",
            "logits": whole_logits or "never whole",
        }
        plan = {"model": network, "data": plan_of_texts(data, tokenizer, config.data)}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_texts(data, config.data.max_length))
        session.write_texts(config.generate)
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
