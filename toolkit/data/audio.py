"""Recordings from files: one channel at the rate of speech models, or why a file is none to learn from."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.rows import Unfit
from toolkit.errors import ConfigError
from toolkit.requirements import optional

RATE = 16_000
"""Samples a second of what models of speech read."""
RATES = (8_000, 192_000)
"""Lowest and highest rate of a file: below, consonants are lost; above, its header is damaged."""
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
"""Of files that are known as recordings."""
Samples = npt.NDArray[np.int16]


def read_audio(file: Path) -> Samples:
    """The samples of a recording at `RATE`: of two channels the mean, in 16 bits.

    PCM in 16 bits is read with the standard library, all else (other WAV, FLAC, OGG, MP3) with soundfile.

    Raises:
        Unfit: the file is not there, damaged, cut off, empty or silent, or has another rate or more channels than
            speech has; the end of a sentence about rows.
        ConfigError: a library that this file needs is not installed.
    """
    if not file.is_file():
        raise Unfit("the recording that they name is not there")
    heard, rate = _pcm(file) or _decoded(file)
    if not RATES[0] <= rate <= RATES[1]:
        raise Unfit(f"their recording has {rate} samples a second, and speech needs {RATES[0]} or more")
    if heard.shape[1] > 2:
        raise Unfit(f"their recording has {heard.shape[1]} channels, and one or two are read")
    mono = heard.mean(axis=1, dtype=np.float32)
    if not mono.any():
        raise Unfit("their recording is silent" if len(mono) else "their recording is empty")
    if rate != RATE:
        mono = optional("soxr", f"{file} of {rate} samples a second", "audio").resample(mono, rate, RATE)
    samples: Samples = np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)
    return samples


def _pcm(file: Path) -> tuple[npt.NDArray[Any], int] | None:
    """Samples (frames, channels) from -1 to 1, and their rate; None where that is not 16-bit PCM in a WAV file."""
    try:
        with wave.open(str(file)) as clip:
            if clip.getsampwidth() != 2:
                return None
            frames, channels, rate = clip.getnframes(), clip.getnchannels(), clip.getframerate()
            heard = np.frombuffer(clip.readframes(frames), "<i2")
    except (wave.Error, EOFError, ValueError):
        return None
    if len(heard) < frames * channels:
        raise Unfit(f"their recording is cut off: {len(heard) / channels / rate:.1f} of {frames / rate:.1f} seconds")
    return heard.reshape(-1, channels).astype(np.float32) / 32768, rate


def _decoded(file: Path) -> tuple[npt.NDArray[Any], int]:
    try:
        soundfile = optional("soundfile", f"{file}, which is no 16-bit PCM in WAV,", "audio")
    except ConfigError:
        with file.open("rb") as content:  # what is no recording at all needs no library
            if not content.read(4):
                raise Unfit("their recording is an empty file") from None
        raise
    try:
        heard, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise Unfit(f"their recording cannot be read ({error.error_string.strip('. ')})") from error
    return heard, int(rate)
