"""EfficientNet-lite: mobile convolutions without squeeze-and-excitation, with ReLU6 (Tan and Le 2019; Google 2020).

Its batch norms keep the statistics that they were trained with, in training too: an image's answer then depends on no
other image of its batch, and a step has the same numbers on any number of processes. Their scales and shifts are
trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

LITE0 = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
"""Blocks of each stage: how many, side of the kernel, stride of the first, expansion, channels."""


class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the network; the defaults are those of lite0.

    Args:
        image_size: side of the images in pixels; any will do.
        num_channels: of the images.
        stages: as `LITE0` has them.
        stem_channels, top_channels: of the convolutions in front of the blocks and behind them.
        dropout: in front of the classes.
        norm_eps: added to the variances.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self,
        image_size: int = 224,
        num_channels: int = 3,
        stages: tuple[tuple[int, ...], ...] = LITE0,
        stem_channels: int = 32,
        top_channels: int = 1280,
        dropout: float = 0.2,
        norm_eps: float = 1e-3,
        **options: Any,
    ) -> None:
        self.image_size = image_size
        self.num_channels = num_channels
        self.stages = [list(stage) for stage in stages]
        self.stem_channels = stem_channels
        self.top_channels = top_channels
        self.dropout = dropout
        self.norm_eps = norm_eps
        super().__init__(**options)


class FixedBatchNorm(nn.Module):
    """A batch norm whose statistics are buffers that nothing changes; its scale and shift are parameters."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of (B, channels, side, side); in the type of `hidden`, as one product and one sum."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(hidden)[:, None, None], hidden, scale.to(hidden)[:, None, None])


class SameConv2d(nn.Conv2d):
    """A convolution that gives ceil(side / stride), with the odd pixel of padding behind, as TensorFlow has it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, above, side, side) → (B, channels, ceil(side / stride), …)."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (
            max(kernel - stride if side % stride == 0 else kernel - side % stride, 0) for side in hidden.shape[-2:]
        )
        padded = F.pad(hidden, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(padded)


class Normed(nn.Module):
    """A convolution and its norm."""

    def __init__(self, above: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1, eps: float) -> None:
        super().__init__()
        self.conv = SameConv2d(above, channels, kernel, stride=stride, groups=groups, bias=False)
        self.norm = FixedBatchNorm(channels, eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        normed: torch.Tensor = self.norm(self.conv(hidden))
        return normed


class Block(nn.Module):
    """More channels, a filter on each of them, fewer channels again; and what went in, where it has that shape."""

    def __init__(self, above: int, channels: int, kernel: int, *, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        wide = above * expansion
        self.expand = Normed(above, wide, 1, eps=eps) if expansion > 1 else None
        self.depthwise = Normed(wide, wide, kernel, stride=stride, groups=wide, eps=eps)
        self.project = Normed(wide, channels, 1, eps=eps)
        self.residual = stride == 1 and above == channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, above, side, side) → (B, channels, ceil(side / stride), …)."""
        wide = hidden if self.expand is None else F.relu6(self.expand(hidden))
        result: torch.Tensor = self.project(F.relu6(self.depthwise(wide)))
        return result + hidden if self.residual else result


class EfficientNetLiteForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Stem, blocks, a last convolution, the mean over the places, and the classes."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "blocks"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps = config.norm_eps
        self.stem = Normed(config.num_channels, config.stem_channels, 3, stride=2, eps=eps)
        self.blocks = nn.ModuleList()
        above = config.stem_channels
        for count, kernel, stride, expansion, channels in config.stages:
            for index in range(count):
                first = stride if index == 0 else 1
                self.blocks.append(Block(above, channels, kernel, stride=first, expansion=expansion, eps=eps))
                above = channels
        self.top = Normed(above, config.top_channels, 1, eps=eps)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.top_channels, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits (B, classes) of images (B, channels, side, side)."""
        hidden = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = F.relu6(self.top(hidden)).mean((2, 3))
        return ImageClassifierOutputWithNoAttention(logits=self.classifier(self.dropout(hidden)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al. 2015, equation 14, for the convolutions; norms change nothing yet, and biases are 0."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, FixedBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
