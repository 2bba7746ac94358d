"""A small convolutional network, whose norms know one image at a time: the same numbers in a batch of any size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

GROUPS = 8
"""Groups of channels that are normed together (Wu and He 2018); the channels of a stage are a multiple of it."""


class ImageCnnConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the network.

    Args:
        image_size: side of the images in pixels; 2 to the power of the number of stages at least.
        num_channels: 1 for grey ones, 3 for coloured ones.
        channels: of each stage, multiples of `GROUPS`; behind each the side is halved.
        dropout: in front of the classes.
    """

    model_type = "image_cnn"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 1,
        channels: tuple[int, ...] = (16, 32, 64),
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        self.image_size = image_size
        self.num_channels = num_channels
        self.channels = list(channels)
        self.dropout = dropout
        super().__init__(**options)


class Stage(nn.Module):
    """Two convolutions of 3 x 3, each with a group norm and a rectifier, and the largest of 2 x 2."""

    def __init__(self, above: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(above, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, above, side, side) → (B, channels, side // 2, side // 2)."""
        hidden = F.relu(self.norm1(self.conv1(hidden)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return F.max_pool2d(hidden, 2)


class ImageCnnForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Stages of convolutions, the mean over the places, and the classes."""

    config_class = ImageCnnConfig
    base_model_prefix = "stages"
    main_input_name = "pixel_values"

    def __init__(self, config: ImageCnnConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels, *config.channels]
        self.stages = nn.ModuleList(Stage(above, channels) for above, channels in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, classes) of images (B, channels, side, side)."""
        hidden = pixel_values
        for stage in self.stages:
            hidden = stage(hidden)
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(self.dropout(hidden.mean((2, 3)))))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al. 2015, equation 14, for the convolutions; norms change nothing yet, and biases are 0."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
