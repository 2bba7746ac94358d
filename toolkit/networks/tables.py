"""Networks that read a row of a table: numbers and categories in, a measurement or the logits of classes out.

A number becomes a vector by sines and cosines of learnt frequencies (Gorishniy, Rubachev and Babenko 2022: On
Embeddings for Numerical Features in Tabular Deep Learning), a category by a table. What both networks do with these
vectors differs: an MLP reads all of them at once, a Transformer as tokens (Gorishniy et al. 2021: Revisiting Deep
Learning Models for Tabular Data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from toolkit.config import TableNetworkConfig
from toolkit.errors import ConfigError
from toolkit.sharing import once_a_node


class TableConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a network of either kind.

    Args:
        numbers: of a row.
        category_sizes: categories of each column.
        outputs: 1 for a measurement, else the number of classes.
        hidden_size: width of the blocks.
        num_hidden_layers: of them.
        num_attention_heads: of a block of the Transformer.
        embedding_size: width of a number's or category's vector, of the MLP; the Transformer's are as wide as it.
        frequencies: learnt of each number.
        frequency_scale: deviation of the frequencies that it begins with.
        dropout: within the blocks.
    """

    numbers: int = 1
    category_sizes: list[int] | tuple[int, ...] = ()
    outputs: int = 1
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    embedding_size: int = 16
    frequencies: int = 32
    frequency_scale: float = 0.1
    dropout: float = 0.0


class TableMlpConfig(TableConfig):
    """Of the MLP."""

    model_type = "table_mlp"


class FTTransformerConfig(TableConfig):
    """Of the Transformer."""

    model_type = "ft_transformer"


def table_network(
    config: TableNetworkConfig, numbers: int, category_sizes: Sequence[int], outputs: int, *, seed: int
) -> PreTrainedModel:
    """A new network in fp32 on the CPU, drawn from `seed`, so that all ranks hold the same.

    Args:
        config: its kind and sizes.
        numbers: of a row.
        category_sizes: categories of each column.
        outputs: 1 for a measurement, else the number of classes.
        seed: of its weights.

    Raises:
        ConfigError: a size that has no effect on this kind, or sizes that do not go together.
    """
    transformer = config.architecture == "ft_transformer"
    for key, read in (("heads", transformer), ("embedding_size", not transformer)):
        if getattr(config, key) is not None and not read:
            raise ConfigError(f"--model.{key} has no effect on --model.architecture {config.architecture}", "Drop it.")
    heads = config.heads or 8
    if transformer and config.hidden_size % heads:
        raise ConfigError(
            f"--model.hidden_size {config.hidden_size} cannot be shared by {heads} heads", "Use a multiple of them."
        )
    kind = FTTransformerForTables if transformer else MlpForTables
    sizes = kind.config_class(
        numbers=numbers,
        category_sizes=list(category_sizes),
        outputs=outputs,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=heads,
        embedding_size=config.embedding_size or 16,
        dropout=config.dropout,
    )

    def draw() -> PreTrainedModel:
        torch.manual_seed(seed)
        return kind(sizes)

    return once_a_node(repr((sizes.to_dict(), seed)), draw)


class NumberEmbedding(nn.Module):
    """Each number as a vector: its sines and cosines, a linear layer of its own, ReLU."""

    def __init__(self, numbers: int, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.empty(numbers, frequencies))
        self.weight = nn.Parameter(torch.empty(numbers, 2 * frequencies + 1, width))
        self.bias = nn.Parameter(torch.empty(numbers, width))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """(B, numbers) → (B, numbers, width)."""
        values = numbers[..., None]
        angles = 2 * math.pi * values.float() * self.frequency.float()
        waves = torch.cat([angles.cos(), angles.sin(), values.float()], -1).to(self.weight.dtype)
        # A product for each number: (numbers, B, waves) with (numbers, waves, width).
        return F.relu(torch.baddbmm(self.bias[:, None], waves.transpose(0, 1), self.weight).transpose(0, 1))


class CategoryEmbedding(nn.Module):
    """A table of vectors for each column. Those of words that training does not know begin, and may stay, as zeros."""

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({str(place): nn.Embedding(size, width) for place, size in enumerate(sizes)})

    def forward(self, categories: torch.Tensor) -> torch.Tensor:
        """(B, columns) → (B, columns, width)."""
        return torch.stack([table(categories[:, int(place)]) for place, table in self.tables.items()], 1)


class Residual(nn.Module):
    """A block of the MLP: norm, wider, ReLU, back again."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, width), what went in being added."""
        found: torch.Tensor = self.back(self.dropout(F.relu(self.wide(self.norm(hidden)))))
        result: torch.Tensor = hidden + self.dropout(found)
        return result


class Attended(nn.Module):
    """A block of the Transformer: attention among the tokens of a row, then a gated layer for each of them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * (4 * width // 3))
        self.back = nn.Linear(4 * width // 3, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, tokens, width), what went in being added."""
        rows, tokens, width = hidden.shape
        parts = self.qkv(self.attention_norm(hidden)).view(rows, tokens, 3, self.heads, -1)
        found = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        hidden = hidden + self.dropout(self.out(found.transpose(1, 2).reshape(rows, tokens, width)))
        wide, gate = self.wide(self.norm(hidden)).chunk(2, -1)
        result: torch.Tensor = hidden + self.dropout(self.back(self.dropout(wide * F.relu(gate))))
        return result


class _ForTables(PreTrainedModel):  # type: ignore[misc]
    """What both have in common: the vectors of a row, and how weights are drawn."""

    base_model_prefix = "model"
    main_input_name = "numbers"
    config: TableConfig

    def _embeddings(self, width: int) -> None:
        sizes = self.config.category_sizes
        count = self.config.numbers
        self.numbers = NumberEmbedding(count, self.config.frequencies, width) if count else None
        self.categories = CategoryEmbedding(sizes, width) if sizes else None

    def _vectors(self, numbers: torch.Tensor, categories: torch.Tensor) -> list[torch.Tensor]:
        """(B, numbers, width) and, where there are any, (B, columns, width)."""
        found = [] if self.numbers is None else [self.numbers(numbers)]
        return found + ([self.categories(categories)] if self.categories is not None else [])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight[:2] = 0  # unknown and empty
        elif isinstance(module, NumberEmbedding):
            init.normal_(module.frequency, std=self.config.frequency_scale)
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)


class MlpForTables(_ForTables):
    """Residual blocks over all vectors of a row, end to end."""

    config_class = TableMlpConfig

    def __init__(self, config: TableMlpConfig) -> None:
        super().__init__(config)
        self._embeddings(config.embedding_size)
        columns = config.numbers + len(config.category_sizes)
        self.first = nn.Linear(columns * config.embedding_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Residual(config.hidden_size, config.dropout) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.outputs)
        self.post_init()

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> SequenceClassifierOutput:
        """Of (B, numbers) and (B, columns): logits (B, outputs)."""
        hidden = self.first(torch.cat(self._vectors(numbers, categories), 1).flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        return SequenceClassifierOutput(logits=self.head(F.relu(self.norm(hidden))))


class FTTransformerForTables(_ForTables):
    """Each vector a token, and one more that reads the others and gives the answer."""

    config_class = FTTransformerConfig

    def __init__(self, config: FTTransformerConfig) -> None:
        super().__init__(config)
        self._embeddings(config.hidden_size)
        self.answer = nn.Embedding(1, config.hidden_size)
        self.blocks = nn.ModuleList(
            Attended(config.hidden_size, config.num_attention_heads, config.dropout)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.outputs)
        self.post_init()

    def forward(self, numbers: torch.Tensor, categories: torch.Tensor) -> SequenceClassifierOutput:
        """Of (B, numbers) and (B, columns): logits (B, outputs)."""
        first = self.answer(torch.zeros(len(numbers), 1, dtype=torch.long, device=numbers.device))
        hidden = torch.cat([first, *self._vectors(numbers, categories)], 1)
        for block in self.blocks:
            hidden = block(hidden)
        return SequenceClassifierOutput(logits=self.head(F.relu(self.norm(hidden[:, 0]))))
