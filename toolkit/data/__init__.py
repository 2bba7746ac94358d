"""Data: sources → clean → split → tokenize → loader.

A recipe calls one verb, which gives token ids in three splits, prepared once and cached by content. What feeds
them to the ranks is in `toolkit.data.loader`.
"""

from toolkit.data.text_classification import TextClassification, text_classification

__all__ = ["TextClassification", "text_classification"]
