"""From a file's bytes to what a network reads: the one way, in training, in evaluation and in predictions."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.data.rows import Unfit
from toolkit.errors import ModelError

FILE = "preprocessor_config.json"
"""Beside a model: how its images are prepared, as transformers has it."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""By which files are taken for images."""
_EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB"})
_BACKGROUND = (255, 255, 255, 255)


@dataclass(frozen=True)
class ImageProcessor:
    """How images are prepared.

    Attributes:
        size: side in pixels of what the network reads.
        channels: 1 for grey, 3 for coloured; 0 where that is not settled yet.
        mean: of each channel, which is taken off; of values from 0 to 1. Empty where it is not settled yet.
        std: of each channel, by which the rest is divided.
        edge: where it is given, the shorter side is brought to so many pixels and the middle cut out; otherwise both
            sides are brought to `size`.
        resample: filter of PIL: 2 is bilinear, 3 bicubic.
    """

    size: int
    channels: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    edge: int | None = None
    resample: int = 2

    def pixels(self, image: Image.Image, channels: int = 0) -> torch.Tensor:
        """An image as (channels, size, size), from 0 to 255 (uint8).

        Args:
            image: from `open_image`.
            channels: in place of the processor's own.
        """
        image = image.convert("L" if (channels or self.channels) == 1 else "RGB")
        width, height = image.size
        if self.edge is None:
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling(self.resample))
        else:
            scale = self.edge / min(width, height)
            sides = (max(self.edge, round(width * scale)), max(self.edge, round(height * scale)))
            image = image.resize(sides, Image.Resampling(self.resample))
            left, top = ((side - self.size) // 2 for side in sides)
            image = image.crop((left, top, left + self.size, top + self.size))
        # A copy: numpy's view of PIL's memory cannot be written to.
        values = torch.from_numpy(np.array(image))
        return values[None] if values.ndim == 2 else values.permute(2, 0, 1)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Values from 0 to 255 (…, channels, side, side) as the network reads them: fp32, by mean and spread."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `preprocessor_config.json`, which transformers reads too (`AutoImageProcessor`)."""
        sides = {"height": self.size, "width": self.size}
        cut = {"size": {"shortest_edge": self.edge}, "do_center_crop": True, "crop_size": sides}
        content: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": sides,
            **(cut if self.edge is not None else {}),
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        Path(folder, FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_processor(folder: Path) -> ImageProcessor:
    """The one that lies beside a model.

    Raises:
        OSError, ValueError: there is none that can be read.
        ModelError: it asks for something that is not done here.
    """
    return read_processor(json.loads((folder / FILE).read_text(encoding="utf-8")), str(folder / FILE))


def read_processor(content: Mapping[str, Any], where: str) -> ImageProcessor:
    """What a `preprocessor_config.json` says.

    Raises:
        ModelError: it asks for something that is not done here.
    """
    try:
        size, crop = _sides(content["size"]), _sides(content["crop_size"]) if content.get("do_center_crop") else None
        scale = float(content.get("rescale_factor", 1 / 255)) if content.get("do_rescale", True) else 1.0
        plain = not content.get("do_normalize", True)
        mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (content["image_mean"], content["image_std"])
        factor = 1 / (255 * scale)  # of models that read values from −1 to 1, or from 0 to 255
        side = crop if crop is not None else size
        return ImageProcessor(
            size=side,
            channels=len(mean),
            mean=tuple(float(value) * factor for value in mean),
            std=tuple(float(value) * factor for value in std),
            edge=size if crop is not None or "shortest_edge" in _named(content["size"]) else None,
            resample=int(content.get("resample", 2)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{where} does not say how images are prepared, or asks for what is not done here: {error}",
            "It takes size, image_mean and image_std, for square images.",
        ) from error


def _named(size: Any) -> Mapping[str, int]:
    return size if isinstance(size, Mapping) else {"height": size, "width": size}


def _sides(size: Any) -> int:
    found = set(_named(size).values())
    if len(found) != 1:
        raise ValueError(f"images of {size}")
    return int(found.pop())


def open_image(data: bytes, min_side: int = 1) -> Image.Image:
    """A file's image, decoded and upright.

    Raises:
        Unfit: it cannot be decoded, is too small, or has values that are not of eight bits.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode not in _EIGHT_BITS:
            raise Unfit(f"it has values of mode {image.mode}, not of 8 bits")
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise Unfit("it is no image that Pillow knows" if data else "it is empty") from None
    except Image.DecompressionBombError as error:
        raise Unfit(f"it is too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, MemoryError) as error:
        raise Unfit(f"it is damaged: {error}") from None
    if min(image.size) < min_side:
        raise Unfit(f"it has {image.width} x {image.height} pixels, and --data.min_side asks for {min_side}")
    if image.has_transparency_data:
        flat = Image.new("RGBA", image.size, _BACKGROUND)
        flat.alpha_composite(image.convert("RGBA"))
        return flat.convert("RGB")
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether all pixels are: a file may hold them in three channels."""
    if image.mode in ("1", "L", "LA", "La"):
        return True
    values = np.asarray(image.convert("RGB"))
    return bool((values == values[..., :1]).all())


def thumbnail(data: bytes, side: int = 72) -> bytes:
    """A PNG of an image for a page, small ones enlarged by whole pixels."""
    image = open_image(data)
    image = image.convert("L" if is_grey(image) else "RGB")
    if max(image.size) > side:
        image.thumbnail((side, side))
    else:
        times = max(1, side // max(image.size))
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mean_and_std(means: Sequence[float], squares: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from the means of values and of their squares; what is all alike has spread 1."""
    spread = [math.sqrt(max(0.0, square - mean**2)) for mean, square in zip(means, squares, strict=True)]
    return tuple(round(mean, 6) for mean in means), tuple(round(value, 6) if value > 1e-4 else 1.0 for value in spread)
