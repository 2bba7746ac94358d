"""Fine-tune a model of speech (Whisper) to write what is said in recordings.

$ accelerate launch recipes/speech.py
$ accelerate launch recipes/speech.py --data.name calls.csv --data.audio file --data.text transcript
$ accelerate launch recipes/speech.py --model.name openai/whisper-small --data.name recordings/ --data.language zh
$ accelerate launch recipes/speech.py --model.freeze '^model\\.encoder\\.'
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
    SpeechConfig,
    StrategyConfig,
    TrainConfig,
)
from toolkit.data.spec_augment import SpecAugment
from toolkit.data.speech import Reading, encoded, minutes, recordings
from toolkit.data.summary import plan_of_examples, report_of_examples
from toolkit.models import width
from toolkit.recognizers import load_processor, load_recognizer
from toolkit.session import Session
from toolkit.start import start
from toolkit.tasks import SpeechRecognition
from toolkit.transcription import Transcription, compared, rules_of


@dataclass(frozen=True)
class Config:
    """Settings of this recipe."""

    model: ModelConfig = ModelConfig(name="sample:whisper-tiny-en")
    adapter: AdapterConfig = AdapterConfig()
    data: SpeechConfig = SpeechConfig(validation_share=0.1, test_share=0.2)
    train: TrainConfig = TrainConfig(epochs=2, global_batch=8, eval_batch=16)
    optim: OptimConfig = OptimConfig(lr=3e-5)
    precision: Precision = "auto"
    """Number format of forward and backward: `auto` takes bf16 where the hardware multiplies it, else fp32."""
    quantization: Quantization = "none"
    """Number format of the linear layers that an adapter leaves frozen: 8 or 4 bits, over bitsandbytes."""
    strategy: StrategyConfig = StrategyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


def main(config: Config) -> None:
    """The whole run."""
    with Session("speech", config) as session:
        speech = recordings(config.data)
        processor = load_processor(config.model, config.data.max_seconds, config.data.language)
        model = load_recognizer(config.model, processor, seed=config.run.seed)
        network = model.config
        reading = Reading(processor.tokenizer, network.max_source_positions, network.max_target_positions)
        data = encoded(config.data, speech, reading)
        model = add_adapter(model, config.adapter, seed=config.run.seed, low_bit=session.low_bit)
        task = SpeechRecognition(
            processor,
            vocabulary=network.vocab_size,
            positions=network.max_target_positions,
            augment=SpecAugment(
                time_masks=config.data.time_masks,
                time_share=config.data.time_mask_share,
                mel_masks=config.data.mel_masks,
                mel_bands=config.data.mel_mask_bands,
                seed=config.run.seed,
            ),
            label_smoothing=config.train.label_smoothing,
        )

        options = {"workers": config.data.workers, "max_bad_rows": config.data.max_bad_rows, "width": width(model)}
        train, validation, test = session.loaders(task, data.train, data.validation, data.test, **options)
        sources = {**plan_of_examples(data), "speech": minutes(data), "window": f"{config.data.max_seconds} seconds"}
        plan = {"model": {"name": config.model.name}, "data": sources}
        session.setup(model, tokenizer=processor, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(data=report_of_examples(data))
        for warning in data.facts["warnings"]:
            session.console.warn(warning)

        rules = rules_of(model, processor)
        transcription = Transcription(task, session.strategy, rules, processor.tokenizer, session.alive)
        before = session.baseline(test, "test before training", task=transcription)
        for step in session.steps(train, validation):  # evaluates, saves, goes on after a kill, stops on a signal
            session.log(step, session.train_step(step))
        after = session.evaluate(test, "test", task=transcription)
        for line in compared(before, after):
            session.console.note(line)
        session.finish(before=before, test=after, predict="CLIP.wav")


if __name__ == "__main__":
    start(main, Config, __doc__ or "")
