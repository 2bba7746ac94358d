"""A classifier over the mean of word vectors (Iyyer et al. 2015, "Deep unordered composition")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BagOfWordsConfig(PreTrainedConfig):  # type: ignore[misc]
    """Its sizes.

    Args:
        vocab_size: rows of the embedding.
        embedding_size: features of a word vector.
        hidden_size: width of the layer between the mean and the classes.
        dropout: probability that a word, and that a feature of that layer, is left out.
        pad_token_id: the row of padding.
    """

    model_type = "bag_of_words"

    def __init__(
        self,
        vocab_size: int = 1000,
        embedding_size: int = 100,
        hidden_size: int = 128,
        dropout: float = 0.1,
        pad_token_id: int = 0,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.dropout = dropout
        super().__init__(pad_token_id=pad_token_id, **more)


class BagOfWordsForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """The mean over the vectors of a text's words, one hidden layer, and the classes."""

    config_class = BagOfWordsConfig
    base_model_prefix = "bag"

    def __init__(self, config: BagOfWordsConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.norm = nn.LayerNorm(config.embedding_size)
        self.hidden = nn.Linear(config.embedding_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word vectors."""
        return self.embedding

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unread: Any
    ) -> SequenceClassifierOutput:
        """Logits (texts, classes) of texts (texts, L)."""
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vectors = self.embedding(input_ids)
        kept = self.dropout(there.to(vectors.dtype)).unsqueeze(-1)  # whole words; the norm makes up for the scale
        mean = (vectors * kept).sum(1) / there.sum(1, keepdim=True).clamp(min=1).to(vectors.dtype)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(torch.relu(self.hidden(self.norm(mean))))))
