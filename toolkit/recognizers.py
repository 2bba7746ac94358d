"""Models of speech: an encoder hears a window of sound, a decoder writes what is said in it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, GenerationConfig

from toolkit.config import ModelConfig
from toolkit.errors import ConfigError, ModelError
from toolkit.folders import refuse_strays
from toolkit.models import Origin, freeze, set_dropout, shorten_window, source_of, unreadable
from toolkit.sharing import once_a_node


def load_processor(config: ModelConfig, seconds: int, language: str | None) -> Any:
    """Tokenizer and feature extractor of a Whisper model, for windows of so many seconds, as transformers' processor.

    Raises:
        ModelError: the model is not there, or is no Whisper.
        ConfigError: a window longer than the model's, or a language that is missing, unknown or not to be chosen.
    """
    source, options = source_of(config)
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        extractor, tokenizer = processor.feature_extractor, processor.tokenizer
        several = _knows_several_languages(source, options)
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "tokenizer and feature extractor of speech", error) from error
    if seconds > extractor.chunk_length:
        raise ConfigError(
            f"--data.max_seconds {seconds}: the model hears {extractor.chunk_length} seconds at a time", "Set it lower."
        )
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * extractor.sampling_rate
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    if language is not None:
        _choose_language(tokenizer, language, several)
    elif several:
        raise ConfigError("this model knows several languages", "Name that of the recordings: --data.language.")
    return processor


def load_recognizer(config: ModelConfig, processor: Any, *, seed: int) -> nn.Module:
    """A Whisper model in fp32 on the CPU, whose encoder reads windows of the length of its processor.

    The positions of the encoder are sinusoids, which are not trained: of a shorter window it has the first ones.

    Args:
        config: which; with `init: random` drawn from `seed`.
        processor: of `load_processor`.
        seed: of new weights, so that all ranks hold the same.

    Raises:
        ModelError: the model is not there, or is no Whisper.
        ConfigError: `freeze` matches nothing, or everything.
    """
    tokenizer, frames = processor.tokenizer, processor.feature_extractor.nb_max_frames
    said = {"language": getattr(tokenizer, "language", None), "task": getattr(tokenizer, "task", None)}
    load = functools.partial(_load, config, frames, said, seed=seed)
    return once_a_node(repr((config, frames, said, seed)), load)


def _load(config: ModelConfig, frames: int, said: dict[str, str | None], *, seed: int) -> nn.Module:
    source, options = source_of(config)
    build: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attention}
    try:
        if Path(source).is_dir():
            refuse_strays(Path(source))
        network = AutoConfig.from_pretrained(source, **options)
        network.dtype = torch.float32
        if config.dropout is not None:
            set_dropout(network, config.dropout)
        torch.manual_seed(seed)
        if config.init == "random":
            model = AutoModelForSpeechSeq2Seq.from_config(network, **build)
            lacking = []
        else:
            model, report = AutoModelForSpeechSeq2Seq.from_pretrained(
                source, config=network, output_loading_info=True, **options, **build
            )
            lacking = sorted(report["missing_keys"])
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "model of speech", error) from error
    if network.model_type != "whisper" or lacking:
        what = f"lacks {len(lacking)} of its weights ({lacking[0]}, …)" if lacking else f"is a {network.model_type}"
        raise ModelError(f"--model.name {config.name} {what}", "Name a Whisper model, as sample:whisper-tiny-en.")
    encoder = model.get_encoder()
    shorten_window(model, frames // (encoder.conv1.stride[0] * encoder.conv2.stride[0]))
    model.config.use_cache = False  # of no use in training; generation has a setting of its own
    if said["language"]:
        model.generation_config.update(**said)
    model.origin = Origin(config.name, config.revision, config.init, ())
    freeze(model, config.freeze)
    return model  # type: ignore[no-any-return]


def _knows_several_languages(source: str, options: dict[str, Any]) -> bool:
    try:
        generation = GenerationConfig.from_pretrained(source, **options)
    except OSError:  # it has none
        return False
    return bool(getattr(generation, "is_multilingual", False))


def _choose_language(tokenizer: Any, language: str, several: bool) -> None:
    if not several:
        raise ConfigError("--data.language has no effect on a model that knows English alone", "Drop it.")
    try:
        tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
    except ValueError as error:
        raise ConfigError(
            f"--data.language {language}: the model knows no such language", "Give a code as en, zh or de."
        ) from error
