"""A saved model of speech that writes what is said in files. Imports torch and transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers

from toolkit.data.audio import RATE, Samples, read_audio
from toolkit.data.rows import Unfit
from toolkit.errors import DataError
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, load_saved
from toolkit.predict.saved import SavedModel

_STEP = RATE // 50


class SpeechAnswers:
    """A saved Whisper model as `toolkit predict` asks it, in fp32; it takes the likeliest token each time.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.

    Raises:
        ConfigError: there is no such device.
        ModelError: the files are damaged.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto") -> None:
        place = choose_device(device)
        model, self._processor = load_saved(
            saved.folder, transformers.AutoModelForSpeechSeq2Seq, transformers.AutoProcessor
        )
        self._model = model.to(place).eval()
        self._window: int = self._processor.feature_extractor.n_samples

    def stream(self, inputs: Iterable[Path], *, batch: int) -> Iterator[list[Answer]]:
        """What is said in each file. One that is longer than the model's window is cut where it is quietest."""
        files = iter(inputs)
        while window := list(islice(files, batch)):
            pieces = [cut(_heard(file), self._window) for file in window]
            texts = self._write([piece for found in pieces for piece in found], batch)
            rest = iter(texts)
            yield [
                Answer(f"{file}\n{text}", {"file": str(file), "text": text})
                for file, found in zip(window, pieces, strict=True)
                for text in [" ".join(filter(None, islice(rest, len(found))))]
            ]

    def _write(self, pieces: Sequence[Samples], batch: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(pieces), batch):
            heard = [piece.astype(np.float32) / 32768 for piece in pieces[start : start + batch]]
            features = self._processor.feature_extractor(heard, sampling_rate=RATE, return_tensors="pt").input_features
            with torch.inference_mode():
                found = self._model.generate(features.to(self._model.device), do_sample=False, num_beams=1)
            texts += [text.strip() for text in self._processor.batch_decode(found, skip_special_tokens=True)]
        return texts


def cut(heard: Samples, window: int) -> list[Samples]:
    """Pieces of at most `window` samples, each cut where its last third is quietest, for 20 ms."""
    pieces = []
    while len(heard) > window:
        first = window - window // 3
        steps = heard[first:window][: window // 3 // _STEP * _STEP].astype(np.float32).reshape(-1, _STEP)
        end = first + int(np.square(steps).sum(1).argmin()) * _STEP + _STEP // 2
        pieces.append(heard[:end])
        heard = heard[end:]
    return [*pieces, heard]


def _heard(file: Path) -> Samples:
    try:
        return read_audio(file)
    except Unfit as reason:
        said = str(reason).replace("their recording", "the recording")
        raise DataError(f"{file}: {said}", "Give recordings as WAV, FLAC, OGG or MP3.") from None
