"""Teach a language model to answer: instruction tuning on conversations, whole or with an adapter.

$ accelerate launch recipes/sft.py
$ accelerate launch recipes/sft.py --model.name meta-llama/Llama-3.2-1B-Instruct --data.name chats.jsonl
$ accelerate launch recipes/sft.py --adapter.name none --optim.lr 2e-5
$ accelerate launch recipes/sft.py --quantization nf4 --strategy.name fsdp
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.adapters import add_adapter
from toolkit.compute import fuse_loss
from toolkit.config import (
    AdapterConfig,
    ChatConfig,
    CheckpointConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    Quantization,
    RunConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data import answer_end, chat, conversations, question, use_template
from toolkit.data.summary import plan_of_chats, report_of_chats
from toolkit.decoders import load_decoder, stop_at
from toolkit.models import input_limits, load_tokenizer, width
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import LanguageModeling


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig(name="sample:smollm2")
    adapter: AdapterConfig = AdapterConfig(name="lora")
    data: ChatConfig = ChatConfig()
    train: TrainConfig = TrainConfig(epochs=1, global_batch=16, eval_batch=16)
    optim: OptimConfig = OptimConfig(lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0, schedule="cosine")
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    generate: GenerateConfig = GenerateConfig(
        prompts=("What is the capital of France?", "Is this sentence correct? She go to school every day."),
        temperature=0.0,
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("sft", config) as session:
        corpus = conversations(config.data)
        tokenizer = load_tokenizer(config.model, pads=False)
        use_template(tokenizer, config.data.template)
        end = answer_end(tokenizer)
        data = chat(config.data, corpus, tokenizer)
        model = load_decoder(config.model, tokenizer, config.data.max_length, seed=config.run.seed)
        stop_at(model, end)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        whole_logits = fuse_loss(model)  # or, where that changes nothing, a loss that needs none
        task = LanguageModeling(tokenizer, fused=not whole_logits, **input_limits(model, config.data.max_length))

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        network = {"name": config.model.name, "logits": whole_logits or "never whole"}
        plan = {"model": network, "data": plan_of_chats(data, tokenizer, config.data)}
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_chats(data, config.data.max_length))
        session.write_texts(config.generate, question, {end})
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        before = session.baseline(test, "test before training")
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after)


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
