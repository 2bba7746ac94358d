"""A classifier over word vectors: those of others, or random ones that are as spread out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from toolkit.config import WordModelConfig
from toolkit.networks.bag_of_words import BagOfWordsConfig, BagOfWordsForSequenceClassification


def load_word_classifier(
    config: WordModelConfig, tokenizer: Any, vectors: torch.Tensor, labels: Sequence[str], *, seed: int, random: bool
) -> nn.Module:
    """A classifier in fp32 on the CPU; but for the vectors, its weights are drawn from `seed`.

    Args:
        config: its sizes.
        tokenizer: of its words.
        vectors: of each of them, (vocabulary, features).
        labels: names of the classes.
        seed: so that all ranks, and both kinds, begin with the same other weights.
        random: draw the vectors, with the mean and spread that `vectors` have feature by feature.
    """
    padding = tokenizer.pad_token_id
    classes = dict(enumerate(labels))
    network = BagOfWordsConfig(
        vocab_size=len(vectors),
        embedding_size=vectors.shape[1],
        hidden_size=config.hidden_size,
        dropout=config.dropout,
        pad_token_id=padding,
        num_labels=len(labels),
        id2label=classes,
        label2id={label: index for index, label in classes.items()},
    )
    torch.manual_seed(seed)
    model = BagOfWordsForSequenceClassification(network)
    if random:
        vectors = vectors.mean(0) + vectors.std(0) * torch.randn(vectors.shape)
    with torch.no_grad():
        model.embedding.weight.copy_(vectors)
        model.embedding.weight[padding] = 0
    model.embedding.weight.requires_grad_(config.embedding == "tuned")
    return model
