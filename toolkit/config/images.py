"""Settings of image classification: the network, the images, and how they are varied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.sections import Count, Natural

Share = Annotated[float, Field(gt=0, lt=1)]
Amount = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class ImageModelConfig:
    """The network: a new one of these sizes, or one to start from."""

    name: str | None = None
    """Weights to start from: `sample:NAME`, a local folder, or a hub id, of any image classifier of transformers. Its
    sizes are its own. By default a new network."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the network of `name` from its configuration alone, without the weights."""
    network: Literal["mlp", "cnn", "vit"] = "cnn"
    """Kind of a new network: a multilayer perceptron, a small convolutional one, or a vision transformer."""
    image_size: Annotated[int, Field(ge=8, strict=True)] | None = None
    """Side in pixels that images are brought to. By default 28 for a new network; weights that are there have their own
    side, and a convolutional network takes others."""
    sizes: tuple[Count, ...] = ()
    """Widths of the hidden layers of an mlp (default 256 128 64), channels of the stages of a cnn (default 16 32 64;
    multiples of 8)."""
    patch_size: Count | None = None
    """vit: side of the squares that the image is cut into (default 4)."""
    layers: Count | None = None
    """vit: blocks (default 4)."""
    hidden_size: Count | None = None
    """vit: width (default 128)."""
    heads: Count | None = None
    """vit: attention heads of a block (default 4)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides every dropout probability of the network; a new one has none."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; a parameter whose name one of them matches (anywhere) is not trained."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """Attention implementation of transformers, of networks that attend."""


@dataclass(frozen=True)
class ImageDataConfig:
    """Labelled images: where they are and how they are split."""

    name: str = "sample:mnist"
    """`sample:NAME`, a folder with a folder of images for each class, or a table (CSV, TSV, JSONL, Parquet; a file, a
    glob or a folder of them). Folders may lie in `train`, `validation` and `test`, and tables be called so."""
    image: str = "image"
    """Column of a table that holds the image: a path (from the table's folder on), or the bytes of a file."""
    label: str = "label"
    """Column of a table that holds the class, as a word or a number."""
    group: str | None = None
    """Column of a table of what must not be parted by a split, as a patient or a camera: all of its images are trained
    on, or none. The split is then not stratified."""
    validation: str | None = None
    """Folder or table with the validation split. Without it a share of the training data is taken."""
    test: str | None = None
    """Folder or table with the test split. Without it a share of the training data is taken."""
    validation_share: Share = 0.1
    """Share of the images held out for validation where no validation split is given."""
    test_share: Share = 0.2
    """Share of the images held out for the test where no test split is given."""
    folds: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Cross-validation: cut the images into so many stratified folds, of which `fold` is the test. It stands in the
    place of `test_share`."""
    fold: Natural = 0
    """Which fold is the test, from 0."""
    train_samples: Count | None = None
    """Use at most so many training images (stratified)."""
    validation_samples: Count | None = None
    """Use at most so many validation images (stratified)."""
    test_samples: Count | None = None
    """Use at most so many test images (stratified)."""
    split_seed: Natural = 0
    """Seed of the splits, apart from the run's seed, so that runs with other seeds are tested alike."""
    deduplicate: bool = True
    """Drop images whose pixels are those of an earlier one, and those that stand under two labels, before the split. A
    split that is given keeps its repeats."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """What a new network is given: `auto` is grey where all training images are."""
    min_side: Count = 8
    """Images with a side of fewer pixels are unfit."""
    workers: Natural | None = None
    """Processes that decode and vary images beside the training process; 0 does it there. By default 1 for a GPU, which
    would wait, and 0 for a CPU, whose cores have enough to do."""
    decode_processes: Count | None = None
    """Processes that look at all images once; by default one for each core, at most 8. Small data uses fewer."""
    max_bad_rows: Natural = 100
    """Images that may turn out unfit (damaged, missing, too small) and are left out, before the run stops."""


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied, anew in each epoch, by seed, epoch and image alone. Never in an evaluation."""

    use: bool = True
    """Vary them; False trains on the images as they are."""
    shift: Amount = 0.08
    """Move by up to this share of the side, in both directions; what is behind the edge is mirrored."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Take a part of the image and enlarge it; its side is drawn from this share to the whole (1: the whole)."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 8.0
    """Rotate by up to so many degrees, either way."""
    flip: bool = False
    """Mirror every other image, left to right. Off by default: a mirrored digit or letter is none."""
    colour: Amount = 0.0
    """Change brightness, contrast and saturation by up to this share; for coloured images alone."""
    mixup: Spread = 0.0
    """Blend each image and its label with another one's, by a share from Beta(a, a) with this a (Zhang et al. 2018; 0.2
    is usual). 0 does not."""
    cutmix: Spread = 0.0
    """Put a rectangle of another image into each, and of its label as much, by a share from Beta(a, a) with this a (Yun
    et al. 2019; 1 is usual). 0 does not; beside mixup, each image gets one of the two."""
