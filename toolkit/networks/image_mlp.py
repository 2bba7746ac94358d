"""A multilayer perceptron for small images: every pixel with every unit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ImageMlpConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the network.

    Args:
        image_size: side of the images in pixels.
        num_channels: 1 for grey ones, 3 for coloured ones.
        hidden_sizes: widths of the hidden layers, from the pixels on.
        dropout: behind each of them.
    """

    model_type = "image_mlp"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 1,
        hidden_sizes: tuple[int, ...] = (256, 128, 64),
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.dropout = dropout
        super().__init__(**options)


class ImageMlpForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Linear layers with rectifiers between them; the default is 784-256-128-64 and the classes."""

    config_class = ImageMlpConfig
    base_model_prefix = "hidden"
    main_input_name = "pixel_values"

    def __init__(self, config: ImageMlpConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        self.hidden = nn.ModuleList(nn.Linear(above, below) for above, below in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, classes) of images (B, channels, side, side)."""
        hidden = pixel_values.flatten(1)
        for layer in self.hidden:
            hidden = self.dropout(F.relu(layer(hidden)))
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(hidden))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al. 2015, equation 10; biases are 0."""
        if isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
