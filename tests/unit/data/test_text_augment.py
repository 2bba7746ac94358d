"""Training texts, varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit.config import TextAugmentConfig
from toolkit.data.text_augment import TextAugmentation, TextMixup, text_augmentation
from toolkit.errors import ConfigError, DataError
from toolkit.tasks import Classification, MultiLabel

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
    rows: dict[str, Any] = {"input_ids": [tokens_of(tokenizer, "the quick fox")], "label": [0], "id": [4]}
    config, data = TextAugmentConfig(delete=0.5), Dataset.from_dict(rows)
    vary = text_augmentation(config, tokenizer, data, seed=0, limits={"positions": None})
    task = Classification(("a", "b"), tokenizer, **vary)
    for _ in range(5):
        assert task.collate(rows, False).inputs["input_ids"].tolist() == rows["input_ids"]
    trained = {tuple(task.collate({**rows, "epoch": [e]}, False).inputs["input_ids"][0].tolist()) for e in range(20)}
    assert len(trained) > 3


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    none = Dataset.from_dict({"input_ids": []})
    assert text_augmentation(TextAugmentConfig(), tokenizer, none, seed=0, limits={"positions": None}) == {}
    with pytest.raises(ConfigError, match="pairs"):
        text_augmentation(TextAugmentConfig(swap=0.1), tokenizer, none, seed=0, limits={}, pairs=True)
    file = tmp_path / "synonyms.txt"
    for settings in ({"replace": 0.1}, {"synonyms": file}, {"paraphrase": 0.1}, {"paraphrases": file}):
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


def test_other_wordings(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "back.csv"
    file.write_text("id,text,paraphrase\n1,the ｆox,fox\n2,the fox,the swift fox\n3,very,very\n")
    settings: dict[str, Any] = {"paraphrase": 0.5, "paraphrases": file}
    config = TextAugmentConfig(**settings)
    rows = Dataset.from_dict({"input_ids": [tokens_of(tokenizer, text) for text in ("quick", "the fox")]})

    class Cutting:
        """Puts special tokens around, as the tokenizers of pretrained models do."""

        all_special_ids = tokenizer.all_special_ids

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": [tokens_of(tokenizer, text) for text in texts]}

    vary = text_augmentation(config, Cutting(), rows, seed=0, limits={"positions": 9}, steps=["nfkc"])["augment"]
    found = {" ".join(tokenizer.convert_ids_to_tokens(vary(rows[1]["input_ids"], e, 5)[1:-1])) for e in range(50)}
    assert found == {"the fox", "fox", "the swift fox"}
    assert vary(rows[0]["input_ids"], 1, 5) == rows[0]["input_ids"]
    with pytest.raises(DataError, match=r"back\.csv has no other wording of a training text"):
        text_augmentation(config, Cutting(), rows.select([0]), seed=0, limits={"positions": 9})
    file.write_text("text,other\nthe fox,fox\n")
    with pytest.raises(DataError, match=r"row 1 has no text in a column 'paraphrase'"):
        TextAugmentation(config, Cutting(), seed=0)
    file.write_text("text,paraphrase\nthe fox,the  fox\n")
    with pytest.raises(DataError, match="has no text in other words"):
        TextAugmentation(config, Cutting(), seed=0)


def test_texts_are_mixed_as_their_labels_are(tokenizer: Any) -> None:
    """A begin of the one, an end of the other, and the share of each in the label; never longer than the longer one."""
    long, short = "the quick rapid fox jump very", "好 佳"
    texts = [long, short]
    rows = Dataset.from_dict({"input_ids": [tokens_of(tokenizer, text) for text in texts], "label": [0, 2]})
    config = TextAugmentConfig(mixup=1.0)
    options: dict[str, Any] = {"seed": 3, "limits": {"positions": 8}}
    task = Classification(
        ("a", "b", "c"), tokenizer, **text_augmentation(config, tokenizer, rows, classes=3, **options)
    )
    given = {"input_ids": rows["input_ids"][:], "label": rows["label"][:], "id": [0, 1]}
    assert task.collate(given, False).labels.tolist() == [0, 2], "not in an evaluation"
    mixed = 0
    for epoch in range(100):
        batch = task.collate({**given, "epoch": [epoch, epoch]}, False)
        for row, text in enumerate(texts):
            ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()
            words = tokenizer.convert_ids_to_tokens(ids[1:-1])
            assert (ids[0], ids[-1], len(ids) <= 8) == (2, 3, True)
            label = batch.labels[row]
            assert label.sum().item() == pytest.approx(1)
            of_long = sum(word in long.split() for word in words)
            assert label[0].item() == pytest.approx(of_long / len(words)), words
            assert words[0] == text.split()[0], "it begins with its own words"
            if 0 < of_long < len(words):
                mixed += 1
                assert words[-1] == texts[1 - row].split()[-1], "and ends with those of the other"
    assert mixed > 40
    batch = task.collate({**given, "epoch": [5, 5]}, False)
    outputs = type("Outputs", (), {"logits": torch.randn(2, 3)})
    wanted = -(batch.labels * outputs.logits.log_softmax(-1)).sum()  # type: ignore[attr-defined]
    assert task.loss(outputs, batch).item() == pytest.approx(wanted.item())
    assert "a" in task.title(batch, 0)

    several = Dataset.from_dict({"input_ids": rows["input_ids"][:], "label": [[1, 0], [1, 1]]})
    mixup = text_augmentation(config, tokenizer, several, **options)["mixup"]
    assert isinstance(mixup, TextMixup)
    labels = [mixup(several[0]["input_ids"], [1, 0], epoch, 0)[1] for epoch in range(30)]
    assert all(label[0] == 1 and 0 <= label[1] < 1 for label in labels)
    assert len({label[1] for label in labels}) > 3
    both = MultiLabel(("a", "b"), tokenizer, mixup=mixup)
    batch = both.collate({**given, "label": [[1, 0], [1, 1]], "epoch": [1, 1]}, False)
    assert batch.labels.shape == (2, 2)
