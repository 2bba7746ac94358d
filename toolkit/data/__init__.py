"""Data: sources → clean → split → tokenize → (pack) → loader.

A recipe calls a verb or two, which give token ids in three splits, prepared once and cached by content. What feeds
them to the ranks is in `toolkit.data.loader`.
"""

from toolkit.data.bpe import decoder_tokenizer
from toolkit.data.chat import answer_end, answer_pairs, chat, conversations, preferences, question, use_template
from toolkit.data.examples import Examples, examples
from toolkit.data.language import LanguageData, language
from toolkit.data.text_classification import TextClassification, text_classification
from toolkit.data.text_corpus import TextCorpus, stream_texts, text_corpus
from toolkit.data.text_pairs import encoded_pairs, text_pairs

__all__ = [
    "Examples",
    "LanguageData",
    "TextClassification",
    "TextCorpus",
    "answer_end",
    "answer_pairs",
    "chat",
    "conversations",
    "decoder_tokenizer",
    "encoded_pairs",
    "examples",
    "language",
    "preferences",
    "question",
    "stream_texts",
    "text_classification",
    "text_corpus",
    "text_pairs",
    "use_template",
]
