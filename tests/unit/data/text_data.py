"""Small data and a small, real tokenizer for the tests of this folder."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TOPICS = {
    "business": "market shares profit bank growth economy sales price oil dollar",
    "sport": "match goal team coach season player league cup win injury",
    "tech": "software phone network computer game internet users music digital chip",
}
COMMON = "the a of in on with said from this will has for and new last year"

Row = dict[str, Any]


class CountingTokenizer(PreTrainedTokenizerFast):
    """The real tokenizer, which also counts how often it is asked to encode."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def rows(count: int = 120, seed: int = 0) -> list[Row]:
    """News-like sentences, all different, in three classes of unlike size (3 : 2 : 1)."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = ["business", "sport", "tech", "business", "sport", "business"][len(found) % 6]
        words = rng.choices(TOPICS[label].split(), k=rng.randint(2, 12)) + rng.choices(COMMON.split(), k=4)
        rng.shuffle(words)
        found.setdefault(" ".join(words), label)
    return [{"text": text, "label": label} for text, label in found.items()]


def tokenizer(texts: Iterable[str], kind: type[PreTrainedTokenizerFast] = CountingTokenizer) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on `texts`, with [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return kind(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def write_csv(path: Path, table: Sequence[Row], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)
    return path


def write_jsonl(path: Path, table: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table), encoding="utf-8")
    return path


def content(dataset: Any) -> list[tuple[int, int, list[int]]]:
    """(id, label, input_ids) of every row."""
    return [(row["id"], row["label"], row["input_ids"]) for row in dataset]
