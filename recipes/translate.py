"""Translate: an encoder–decoder from nothing on pairs of texts, or a pretrained one to go on from.

$ accelerate launch recipes/translate.py
$ accelerate launch recipes/translate.py --config configs/translate/german.yaml
$ accelerate launch recipes/translate.py --data.name train.en,train.zh --data.test test.en,test.zh
$ accelerate launch recipes/translate.py --model.name facebook/nllb-200-distilled-600M \
    --data.source_lang eng_Latn --data.target_lang zho_Hans --optim.lr 5e-5
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import (
    AdapterConfig,
    CheckpointConfig,
    DecodeConfig,
    EncoderDecoderConfig,
    OptimConfig,
    Precision,
    Quantization,
    RunConfig,
    StrategyConfig,
    TokenizerConfig,
    TrainConfig,
    TranslationConfig,
)
from toolkit.data import encode_pairs, pairs_tokenizer, text_pairs
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.encoder_decoders import load_encoder_decoder, start_token, tell_languages
from toolkit.generation import write_as
from toolkit.models import input_limits, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import Seq2Seq
from toolkit.text_scores import bleu_and_chrf


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: EncoderDecoderConfig = EncoderDecoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    tokenizer: TokenizerConfig = TokenizerConfig(vocabulary=4000)
    data: TranslationConfig = TranslationConfig(validation_share=0.03, test_share=0.03, max_target_length=48)
    train: TrainConfig = TrainConfig(epochs=6, global_batch=32, label_smoothing=0.1)
    optim: OptimConfig = OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, schedule="cosine")
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    generate: DecodeConfig = DecodeConfig(beams=4)
    bleu_tokenizer: Literal["auto", "13a", "zh", "char", "intl"] = "auto"
    """How sacrebleu cuts texts into words: `zh` for Chinese, `13a` for languages with spaces; `auto` looks at them."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("translate", config) as session:
        corpus = text_pairs(config.data)
        tokenizer = pairs_tokenizer(config.model, config.tokenizer, corpus)
        tell_languages(tokenizer, config.data.source_lang, config.data.target_lang)
        data = encode_pairs(config.data, corpus, tokenizer)
        longest = max(config.data.max_length, config.data.max_target_length)
        model = load_encoder_decoder(config.model, tokenizer, longest, seed=config.run.seed)
        write_as(model, tokenizer, config.generate, tokens=config.data.max_target_length)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        smoothing = config.train.label_smoothing
        whole_logits = "labels are smoothed" if smoothing else fuse_loss(model)  # or a loss that needs none
        task = Seq2Seq(
            tokenizer,
            start=start_token(model),
            label_smoothing=smoothing,
            fused=not whole_logits,
            **input_limits(model, longest),
        )

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": config.model.name or "a new encoder–decoder", "logits": whole_logits or "never whole"}
        plan = {"model": network, "data": plan_of_examples(data, config.data.max_length)}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_examples(data, config.data.max_length))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        score = partial(bleu_and_chrf, tokenizer=config.bleu_tokenizer)
        scored = partial(session.score_texts, test, "translating the test", score)
        before = session.baseline(test, "test before training", partial(scored, show=config.generate.show))
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test") | scored(show=config.generate.show)
        if config.generate.beams > 1:
            session.compare(after, {"greedy, not beams": scored(beams=1)})
        session.finish(before=before, test=after)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
