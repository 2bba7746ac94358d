"""Data: sources → clean → split → tokenize → (pack) → loader.

A recipe calls a verb or two, which give token ids in three splits, prepared once and cached by content. What feeds
them to the ranks is in `toolkit.data.loader`.
"""

from toolkit.data.anchors import anchored_texts, encoded_anchors
from toolkit.data.answer_spans import answer_spans, answered_questions
from toolkit.data.bpe import decoder_tokenizer
from toolkit.data.chat import answer_end, answer_pairs, chat, conversations, preferences, question, use_template
from toolkit.data.examples import Examples, examples
from toolkit.data.language import LanguageData, language
from toolkit.data.text_classification import TextClassification, text_classification
from toolkit.data.text_corpus import TextCorpus, stream_texts, text_corpus
from toolkit.data.text_pairs import encode_pairs, pairs_tokenizer, text_pairs
from toolkit.data.text_targets import labelled_texts
from toolkit.data.token_tags import tag_labels, tagged_tokens, token_tags

__all__ = [
    "Examples",
    "LanguageData",
    "TextClassification",
    "TextCorpus",
    "anchored_texts",
    "answer_end",
    "answer_pairs",
    "answer_spans",
    "answered_questions",
    "chat",
    "conversations",
    "decoder_tokenizer",
    "encode_pairs",
    "encoded_anchors",
    "examples",
    "labelled_texts",
    "language",
    "pairs_tokenizer",
    "preferences",
    "question",
    "stream_texts",
    "tag_labels",
    "tagged_tokens",
    "text_classification",
    "text_corpus",
    "text_pairs",
    "token_tags",
    "use_template",
]
