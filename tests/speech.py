"""Recordings and a model of speech for tests: words are tones, and the network is tiny."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

WORDS = {"low": 300.0, "mid": 900.0, "high": 2700.0}


def say(words: list[str], file: Path, *, rate: int = 16_000, channels: int = 1, seed: int = 0) -> None:
    """A fifth of a second of a tone for each word, over a little noise, in 16-bit PCM."""
    time = np.arange(rate // 5) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, len(words) * len(time))
    heard = np.concatenate([np.sin(2 * np.pi * WORDS[word] * time) for word in words]) * 0.5 + noise
    with wave.open(str(file), "wb") as clip:
        clip.setnchannels(channels)
        clip.setsampwidth(2)
        clip.setframerate(rate)
        clip.writeframes(np.repeat(np.int16(heard * 32000), channels).tobytes())


def save_recordings(folder: Path, rows: int = 48) -> Path:
    """`clips.jsonl` beside as many recordings of one to four words; the file."""
    (folder / "clips").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with (folder / "clips.jsonl").open("w", encoding="utf-8") as out:
        for row in range(rows):
            words = draw.choice(list(WORDS), size=draw.integers(1, 5)).tolist()
            say(words, folder / "clips" / f"{row}.wav", seed=row)
            out.write(json.dumps({"audio": f"clips/{row}.wav", "text": f"{' '.join(words).capitalize()}."}) + "\n")
    return folder / "clips.jsonl"


def save_speech_model(folder: Path, *, seconds: int = 2, seed: int = 0) -> None:
    """A tiny Whisper that knows bytes, with its processor."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(vocab=letters, merges=[], additional_special_tokens=special)
    tokenizer.pad_token = tokenizer.eos_token
    end, start, silent = tokenizer.convert_tokens_to_ids(special)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=seconds), tokenizer).save_pretrained(folder)
    torch.manual_seed(seed)
    tokens = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=16,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=50 * seconds,
            max_target_positions=40,
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(
        **tokens,
        is_multilingual=False,
        no_timestamps_token_id=silent,
        max_length=40,
        suppress_tokens=[5],
        begin_suppress_tokens=[end],
    )
    model.save_pretrained(folder)
