"""Teach a language model which of two answers is preferred: DPO and its kin on pairs, whole or with an adapter.

$ accelerate launch recipes/dpo.py
$ accelerate launch recipes/dpo.py --model.name runs/sft/NAME/model --data.name pairs.jsonl
$ accelerate launch recipes/dpo.py --preference.loss ipo --preference.beta 0.2
$ accelerate launch recipes/dpo.py --adapter.name none --optim.lr 1e-6
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import (
    AdapterConfig,
    CheckpointConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    Precision,
    PreferenceConfig,
    Quantization,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data import answer_end, answer_pairs, preferences, question, use_template
from toolkit.data.summary import plan_of_pairs, report_of_pairs
from toolkit.decoders import load_decoder, stop_at
from toolkit.models import input_limits, load_tokenizer, width
from toolkit.reference import check_reference, score_reference
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import Preferences


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig(name="sample:smollm2")
    adapter: AdapterConfig = AdapterConfig(name="lora")
    data: PairsConfig = PairsConfig(validation_share=0.05, test_share=0.1)
    preference: PreferenceConfig = PreferenceConfig()
    train: TrainConfig = TrainConfig(epochs=1, global_batch=16, eval_batch=16)
    optim: OptimConfig = OptimConfig(lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine")
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    generate: GenerateConfig = GenerateConfig(prompts=("How do I keep bread fresh for longer?",), temperature=0.0)
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    check_reference(config.adapter, config.preference)
    with Session("dpo", config) as session:
        corpus = answer_pairs(config.data)
        tokenizer = load_tokenizer(config.model, pads=False)
        use_template(tokenizer, config.data.template)
        end = answer_end(tokenizer)
        data = preferences(config.data, corpus, tokenizer)
        model = load_decoder(config.model, tokenizer, config.data.max_length, seed=config.run.seed)
        stop_at(model, end)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        whole_logits = fuse_loss(model, each_text=True)
        task = Preferences(
            tokenizer,
            loss=config.preference.loss,
            beta=config.preference.beta,
            label_smoothing=config.train.label_smoothing,
            pairs=sum(data.facts["sequences"].values()),
            fused=not whole_logits,
            **input_limits(model, config.data.max_length),
        )

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": config.model.name, "logits": whole_logits or "never whole"}
        sources = plan_of_pairs(data, tokenizer, config.data)
        plan = {"model": network, "data": sources, "preference": task.describe()}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_pairs(data, config.data.max_length))
        session.write_texts(config.generate, question, {end})
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        score_reference(session, task, (train, validation, test))  # while the model is what it is to be held against
        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
