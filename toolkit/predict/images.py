"""A saved classifier of images that answers. Imports torch and transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from toolkit.data.images import load_processor, open_image
from toolkit.data.rows import Unfit
from toolkit.errors import ConfigError, DataError, NumericsError
from toolkit.predict.kinds import Answer
from toolkit.predict.loading import choose_device, load_network, loading
from toolkit.predict.saved import SavedModel


class ImageAnswers:
    """A saved classifier of images, ready to answer in fp32; images are prepared as in its training, and not varied.

    Args:
        saved: from `find_model`.
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
        top: give so many labels, the likeliest first.

    Raises:
        ConfigError: there is no such device, or fewer labels.
        ModelError: the files are damaged, or do not say how images are prepared.
    """

    def __init__(self, saved: SavedModel, *, device: str = "auto", top: int = 1) -> None:
        self._device = choose_device(device)
        with loading(saved.folder):
            self._processor = load_processor(saved.folder)
        model = load_network(saved.folder)
        self._model = model.to(self._device).eval()
        self._labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        if top > len(self._labels):
            raise ConfigError(f"--top {top}: the model has {len(self._labels)} labels", "Ask for fewer.")
        self._top = top

    def stream(self, inputs: Iterable[Path], *, batch: int) -> Iterator[list[Answer]]:
        """The labels of each file.

        Raises:
            DataError: a file is no image that can be read.
            NumericsError: the model's answer is not finite.
        """
        rest = iter(inputs)
        while window := list(islice(rest, batch)):
            yield self._answers(window)

    def _answers(self, files: Sequence[Path]) -> list[Answer]:
        pixels = torch.stack([self._read(file) for file in files])
        with torch.inference_mode():
            found = self._model(pixel_values=pixels.to(self._device)).logits.float().softmax(-1)
        if not torch.isfinite(found).all():
            raise NumericsError(
                "the model's answer is not finite", "Its weights are damaged, or its training diverged: see its report."
            )
        scores, labels = found.topk(self._top)
        return [
            self._answer(file, [(self._labels[label], score) for label, score in zip(*ranked, strict=True)])
            for file, *ranked in zip(files, labels.tolist(), scores.tolist(), strict=True)
        ]

    def _read(self, file: Path) -> torch.Tensor:
        try:
            return self._processor.normalise(self._processor.pixels(open_image(file.read_bytes())))
        except Unfit as reason:
            raise DataError(f"{file} cannot be answered: {reason}", "Leave it out.") from None
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}", "Check its permissions.") from error

    def _answer(self, file: Path, ranked: Sequence[tuple[str, float]]) -> Answer:
        (label, score), *_ = ranked
        shown = f"{file}: " + ", ".join(f"{name} {value:.4f}" for name, value in ranked)
        fields: dict[str, Any] = {"file": str(file), "label": label, "score": float(f"{score:.6g}")}
        for rank, (name, value) in enumerate(ranked[1:], start=2):
            fields |= {f"label_{rank}": name, f"score_{rank}": float(f"{value:.6g}")}
        return Answer(shown, fields)
