"""Training texts, varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit.config import TextAugmentConfig
from toolkit.data.text_augment import TextAugmentation, text_augmentation
from toolkit.errors import ConfigError, DataError
from toolkit.tasks import Classification

WORDS = ("the", "quick", "fast", "rapid", "fox", "jump", "##ed", "very", "swift", "##ly", "好", "佳", "看")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    return [2, *tokenizer(text, add_special_tokens=False)["input_ids"], 3]


def varied(tokenizer: Any, text: str, times: int = 200, longest: int | None = None, **settings: Any) -> set[str]:
    augment = TextAugmentation(TextAugmentConfig(**settings), tokenizer, seed=7, longest=longest)
    found = [augment(tokens_of(tokenizer, text), epoch, 5) for epoch in range(times)]
    assert all(tokens[0] == 2 and tokens[-1] == 3 for tokens in found), "special tokens stay where they are"
    return {" ".join(tokenizer.convert_ids_to_tokens(tokens[1:-1])) for tokens in found}


def test_words_are_replaced_by_words_of_their_line(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("quick, fast\trapid\n\n好，佳\nfox, nowhere\nvery quick, swift\n", encoding="utf-8")
    settings = {"replace": 0.5, "synonyms": file}
    assert varied(tokenizer, "the quick fox", **settings) == {f"the {word} fox" for word in ("quick", "fast", "rapid")}
    assert varied(tokenizer, "好 看", **settings) == {"好 看", "佳 看"}
    # Of several words one, and one of several; the beginning of a longer word is none.
    assert varied(tokenizer, "swift", **settings) == {"swift", "very quick"}
    assert varied(tokenizer, "swiftly", **settings) == {"swift ##ly"}
    assert "swift fox" in varied(tokenizer, "very quick fox", **settings)
    # Never longer than the model takes.
    assert varied(tokenizer, "swift", longest=3, **settings) == {"swift"}


def test_tokens_are_left_out(tokenizer: Any) -> None:
    found = varied(tokenizer, "the quick fox", delete=0.4)
    assert found == {"the quick fox", "the quick", "the fox", "quick fox", "the", "quick", "fox"}


def test_tokens_change_places(tokenizer: Any) -> None:
    found = varied(tokenizer, "the quick fox", swap=0.3)
    assert {"quick the fox", "the fox quick", "fox quick the"} < found
    assert all(sorted(text.split()) == ["fox", "quick", "the"] for text in found)
    assert varied(tokenizer, "fox", swap=0.9) == {"fox"}


def test_it_follows_from_seed_epoch_and_sample(tokenizer: Any) -> None:
    config = TextAugmentConfig(delete=0.3, swap=0.3)
    tokens = tokens_of(tokenizer, "the quick rapid fox jumped very very swiftly")

    def draw(seed: int, epoch: int, sample: int) -> list[int]:
        return TextAugmentation(config, tokenizer, seed=seed)(tokens, epoch, sample)

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*place)) for place in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))}) == 4


def test_in_training_alone(tokenizer: Any) -> None:
    augment = text_augmentation(TextAugmentConfig(delete=0.5), tokenizer, seed=0, limits={"positions": None})
    task = Classification(("a", "b"), tokenizer, augment=augment)
    rows: dict[str, Any] = {"input_ids": [tokens_of(tokenizer, "the quick fox")], "label": [0], "id": [4]}
    for _ in range(5):
        assert task.collate(rows, False).inputs["input_ids"].tolist() == rows["input_ids"]
    trained = {tuple(task.collate({**rows, "epoch": [e]}, False).inputs["input_ids"][0].tolist()) for e in range(20)}
    assert len(trained) > 3


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    assert text_augmentation(TextAugmentConfig(), tokenizer, seed=0, limits={"positions": None}) is None
    file = tmp_path / "synonyms.txt"
    for settings in ({"replace": 0.1}, {"synonyms": file}):
        with pytest.raises(ConfigError, match="need each other"):
            TextAugmentation(TextAugmentConfig(**settings), tokenizer, seed=0)  # type: ignore[arg-type]
    config = TextAugmentConfig(replace=0.1, synonyms=file)
    for content, message in (
        (None, "cannot be read"),
        ("quick, fast\nfox", r"synonyms\.txt, line 2: 'fox' stands alone"),
        ("nowhere, nothing", "has no two words of one meaning"),
    ):
        if content is not None:
            file.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            TextAugmentation(config, tokenizer, seed=0)
