"""Matrices of word embeddings: what is read, what is copied, composed and drawn, and what is refused with its line."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from toolkit.config import VectorsConfig, VocabularyConfig
from toolkit.embeddings import Target, load_embedding, nearest_words, reduced, transfer, vectors_for, word_vectors
from toolkit.embeddings.contexts import Encoder, alone, in_texts
from toolkit.embeddings.files import read_vectors
from toolkit.embeddings.folder import write_matrix
from toolkit.embeddings.table import Table
from toolkit.embeddings.targets import load_target, read_words
from toolkit.embeddings.transfer import KINDS, coverage
from toolkit.embeddings.words import Piece, fold, parts, pieces_of, word_tokenizer, words_in
from toolkit.errors import ConfigError, DataError, ModelError

WORDS = {"king": [1.0, 0.5], "queen": [1.0, 0.25], "北京": [-1.0, 2.0], "经": [0.0, 3.0], "济": [2.0, 1.0]}


def as_text(header: bool = True) -> bytes:
    lines = [f"{len(WORDS)} 2"] if header else []
    lines += [f"{word} {vector[0]} {vector[1]}" for word, vector in WORDS.items()]
    return ("\n".join(lines) + "\n").encode()


def as_binary(newlines: bool) -> bytes:
    end = b"\n" if newlines else b""
    return f"{len(WORDS)} 2\n".encode() + b"".join(
        word.encode() + b" " + struct.pack("<2f", *vector) + end for word, vector in WORDS.items()
    )


FILES = {
    "word2vec.txt": as_text(),
    "glove.txt": as_text(header=False),
    "vectors.vec": as_text(),
    "vectors.txt.gz": gzip.compress(as_text()),
    "vectors.bin": as_binary(newlines=True),
    "google.bin": as_binary(newlines=False),
    "vectors.bin.gz": gzip.compress(as_binary(newlines=True)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_word_vectors(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    found = read_vectors(tmp_path / name, lambda word: word != "queen")
    assert found.words == [word for word in WORDS if word != "queen"]
    np.testing.assert_array_equal(found.vectors, [WORDS[word] for word in found.words])
    assert (found.read, found.repeated, found.undecodable) == (5, 0, 0)


def test_oddities_of_well_known_files(tmp_path: Path) -> None:
    file = tmp_path / "glove.txt"
    file.write_bytes(b"king 1 2\n. . 3 4\nking 5 6\n\xff\xfe 7 8\n")
    found = read_vectors(file, lambda word: True)
    assert found.words == ["king", ". ."]
    assert found.vectors.tolist() == [[1, 2], [3, 4]]
    assert (found.read, found.repeated, found.undecodable) == (4, 1, 1)


FAULTS = {
    "too few": ("a.txt", b"king 1 2\nqueen 1\n", "line 2: 1 numbers behind a word, where 2 are due"),
    "no number": ("a.txt", b"king 1 2\nqueen 1 x\n", "line 2: could not convert string to float"),
    "not finite": ("a.txt", b"king 1 2\nqueen 1 nan\n", "line 2: a number is not finite"),
    "promise": ("a.txt", b"3 2\nking 1 2\nqueen 1 2\n", "has 2 words, and its first line promises 3"),
    "features": ("a.txt", b"1 3\nking 1 2\n", "line 2: 2 numbers behind a word, where 3 are due"),
    "empty": ("a.txt", b"", "has no vectors"),
    "prose": ("a.txt", b"king\n", "line 1: 0 numbers behind a word, where there must be some"),
    "cut off": ("a.bin", as_binary(newlines=True)[:-5], "word 5 of 5: its numbers are cut off"),
    "longer": ("a.bin", as_binary(newlines=True) + b"abc", "bytes or more behind the 5 words"),
    "no binary": ("a.bin", as_text(header=False), "does not begin with a number of words"),
    "no gzip": ("a.txt.gz", as_text(), "cannot be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_malformed_file_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    file, content, said = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_vectors(tmp_path / file, lambda word: True)


# Words and tokenizers


def test_what_is_alike() -> None:
    assert fold("ＡＢＣ") == fold("abc") == fold("Abc")
    assert parts("经济学") == ["经", "济", "学"]
    assert parts("well-known") == ["well", "known"]
    assert parts("word") == []
    assert words_in("The U２ 演唱会, 真 好!", True, False) == ["the", "u2", "演唱会", ",", "真", "好", "!"]
    assert words_in("很好ok", True, True) == ["很", "好", "ok"]


def test_chinese_is_cut_into_the_most_probable_words() -> None:
    tokenizer = word_tokenizer({"研究": 9, "研究生": 3, "生命": 8, "命": 1, "生": 1, "起源": 4, "market": 5}, True)
    cut: Callable[[str], list[str]] = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])  # noqa: E731
    assert cut("研究生命起源") == ["研究", "生命", "起源"]
    assert cut("Market 研究生") == ["market", "研究生"]
    assert "[UNK]" in cut("龘")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "研究"]) == [0, 1, 2]


def test_words_between_spaces() -> None:
    tokenizer = word_tokenizer({"the": 2, "rapist": 1, ".": 1}, True)
    assert tokenizer("The therapist.")["input_ids"] == [2, 1, 4]


def marked(kind: str) -> PreTrainedTokenizerFast:
    if kind == "##":
        model: Any = models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "##ed": 3, "ing": 4}, unk_token="[UNK]")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "▁":
        scored = [("[UNK]", 0.0), ("▁play", -1.0), ("ing", -2.0), ("▁ing", -2.0), ("▁", -3.0), ("<0x41>", -9.0)]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        names = {"[UNK]": 0, "Ġplay": 1, "ing": 2, "Ġing": 3, "äº": 4, "ä½ł": 5}
        tokenizer = Tokenizer(models.BPE(names, [], unk_token="[UNK]"))
        tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


PIECES = {
    "##": ["", "play", "(ing)", "(ed)", "ing"],
    "▁": ["", "play", "(ing)", "ing", "", ""],
    "Ġ": ["", "play", "(ing)", "ing", "", "(你)"],
}


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_of_tokenizers(kind: str) -> None:
    found = pieces_of(marked(kind))
    assert [p.text if p.begins or not p.text else f"({p.text})" for p in found] == PIECES[kind]


# Transfer


def target_of(*words: str, counts: list[int] | None = None) -> Target:
    tokenizer = word_tokenizer(dict.fromkeys(words, 1), lowercase=False)
    return Target([Piece(piece.text) for piece in pieces_of(tokenizer)], tokenizer, counts, "some words")


def source_of(words: dict[str, list[float]]) -> Table:
    rows = {word: row for row, word in enumerate(words)}
    return Table(
        torch.tensor(list(words.values())),
        [Piece(word) for word in words],
        lambda piece: [rows[char] for char in piece.text if char in rows],
        "a table",
    )


def test_copied_composed_and_drawn() -> None:
    target = target_of("king", "King", "经济", "zzz", counts=[0, 0, 5, 2, 2, 1])
    matrix = transfer(target, source_of(WORDS))
    assert [KINDS[kind] for kind in matrix.kinds] == ["special", "special", "exact", "folded", "composed", "drawn"]
    assert matrix.weights[0].tolist() == [0, 0]  # padding
    assert matrix.weights[2:5].tolist() == [[1.0, 0.5], [1.0, 0.5], [1.0, 2.0]]
    told = coverage(target, matrix)
    assert told["by_kind"] == {"exact": 1, "folded": 1, "composed": 1, "drawn": 1, "special": 2}
    assert told["by_occurrence"] == pytest.approx(
        {"exact": 0.5, "folded": 0.2, "composed": 0.2, "drawn": 0.1, "special": 0}
    )
    strict = transfer(target, source_of(WORDS), folds=False, composes=False)
    assert [KINDS[kind] for kind in strict.kinds[2:]] == ["exact", "drawn", "drawn", "drawn"]


def test_what_is_drawn_is_as_spread_out() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.tensor([3.0, -1.0]) + torch.tensor([0.1, 2.0]) * torch.randn(500, 2, generator=generator)
    known = {f"w{number}": vector for number, vector in enumerate(vectors.tolist())}
    target = target_of(*known, *(f"u{number}" for number in range(4000)))
    matrix = transfer(target, source_of(known), composes=False)
    drawn = matrix.weights[matrix.kinds == KINDS.index("drawn")]
    torch.testing.assert_close(drawn.mean(0), vectors.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.std(0), vectors.std(0), rtol=0.05, atol=0)
    again, other = (transfer(target, source_of(known), composes=False, seed=seed).weights for seed in (0, 1))
    assert torch.equal(again, matrix.weights)
    assert not torch.equal(other, matrix.weights)


def test_nothing_in_common_is_told() -> None:
    with pytest.raises(DataError, match="not one of the 4 tokens of some words has a vector in a table"):
        transfer(target_of("x", "y"), source_of({"甲": [1.0, 2.0]}))


def test_fewer_features() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    known = {f"w{number}": vector for number, vector in enumerate(vectors.tolist())}
    target = target_of(*known, "unknown")
    matrix = transfer(target, source_of(known), composes=False)
    fewer = reduced(matrix, 0, 3)
    theirs = PCA(3).fit(vectors.numpy())
    ours = fewer.weights[fewer.found].numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs.transform(vectors.numpy())), atol=1e-3)
    assert fewer.facts["variance_kept"] == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-4)
    assert fewer.weights[0].tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="--matrix.dimension 6 has no effect"):
        reduced(matrix, 0, 6)


def test_neighbours() -> None:
    words = {"king": [1.0, 0.1], "queen": [1.0, 0.0], "car": [-1.0, 0.1], "bus": [-1.0, 0.0]}
    target = target_of(*words)
    found = nearest_words(target, transfer(target, source_of(words)), ["king", "bus"], 1)
    assert {word: near[0][0] for word, near in found.items()} == {"king": "queen", "bus": "car"}
    with pytest.raises(ConfigError, match="--matrix.neighbours ship: not in the vocabulary"):
        nearest_words(target, transfer(target, source_of(words)), ["ship"])


# From files and models


def test_a_list_of_words_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Queen\n经济\n北京\nship\n", encoding="utf-8")
    (tmp_path / "vectors.bin").write_bytes(FILES["vectors.bin"])
    target = load_target(VocabularyConfig(words=tmp_path / "words.txt", texts=(), lowercase=False))
    source = vectors_for(target, VectorsConfig(name=str(tmp_path / "vectors.bin")))
    matrix = transfer(target, source)
    assert [KINDS[kind] for kind in matrix.kinds[2:]] == ["folded", "composed", "exact", "drawn"]
    assert matrix.weights[3].tolist() == [1.0, 2.0]

    facts = write_matrix(tmp_path / "matrix", target, matrix, {})
    layer = load_embedding(tmp_path / "matrix", freeze=True)
    assert torch.equal(layer.weight, matrix.weights)
    assert (layer.padding_idx, layer.weight.requires_grad) == (0, False)
    assert torch.equal(load_file(tmp_path / "matrix" / "embeddings.safetensors")["weight"], matrix.weights)
    listed = (tmp_path / "matrix" / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
    assert listed == ["[PAD]", "[UNK]", "Queen", "经济", "北京", "ship"]
    assert json.loads((tmp_path / "matrix" / "vocabulary.json").read_text())["北京"] == 4
    assert "| folded | 1 |" in (tmp_path / "matrix" / "README.md").read_text()
    assert "by_occurrence" not in facts  # no counts were given
    tokenizer, weights = word_vectors(str(tmp_path / "matrix"))
    assert tokenizer("北京经济")["input_ids"] == [4, 3]
    assert torch.equal(weights, matrix.weights)

    (tmp_path / "matrix" / "embeddings.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is no whole matrix of embeddings"):
        load_embedding(tmp_path / "matrix")


LISTS = {
    "blank": ("a\n\nb\n", "line 2: there is no word"),
    "twice": ("a\nb\na\n", "line 3: 'a' stands in an earlier line"),
    "count": ("a\t3\nb\tmany\n", "line 2: 'many' is no count"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_malformed_list_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    content, said = LISTS[name]
    (tmp_path / "words.txt").write_text(content)
    with pytest.raises(DataError, match=said):
        read_words(tmp_path / "words.txt")


def test_words_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    texts = ["我们 爱 北京 。", "北京 爱 我们", "北京 很 大", "the The market", "market ２"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = VocabularyConfig(texts=(str(tmp_path / "texts.jsonl"),))
    target = load_target(config)
    words = [piece.text for piece in target.pieces[2:]]
    assert words[:5] == ["北京", "market", "the", "我们", "爱"]
    assert set(words[5:]) == {"京", "们", "北", "我"}  # what the words consist of
    assert target.counts is not None
    assert target.counts[2:5] == [3, 2, 2]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=9, intermediate_size=32, **sizes, initializer_range=0.5)).eval()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "well", "京", "北"]
    tokenizer = Tokenizer(models.WordPiece({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer()
    from tokenizers.processors import TemplateProcessing

    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return Encoder(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), 2, 16)


def states(encoder: Encoder, text: str) -> torch.Tensor:
    given = encoder.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return encoder.model(**given).last_hidden_state[0]  # type: ignore[no-any-return]


def test_words_by_themselves(encoder: Encoder) -> None:
    table = alone(encoder, [Piece("playing"), Piece("well"), Piece("zzz"), Piece("")], "it", lambda done: None)
    assert [piece.text for piece in table.pieces] == ["well", "playing"]  # of zzz the model knows nothing
    torch.testing.assert_close(table.vectors[0], states(encoder, "well")[1])
    torch.testing.assert_close(table.vectors[1], states(encoder, "playing")[1:3].mean(0))


def test_words_in_texts(encoder: Encoder) -> None:
    cut = word_tokenizer({"playing": 1, "well": 1, "北京": 2}, lowercase=True)
    texts = ["Playing well zzz", "北京 playing", "well 北京 well", "well"]
    table = in_texts(encoder, cut, texts, occurrences=2, name="it", on_done=lambda done: None)
    found = dict(zip([piece.text for piece in table.pieces], table.vectors, strict=True))
    first, second, third = (states(encoder, text) for text in texts[:3])
    assert sorted(found) == sorted(["playing", "well", "北京"])
    torch.testing.assert_close(found["playing"], (first[1:3].mean(0) + second[3:5].mean(0)) / 2)
    torch.testing.assert_close(found["北京"], (second[1:3].mean(0) + third[2:4].mean(0)) / 2)
    torch.testing.assert_close(found["well"], (first[3] + third[1]) / 2)  # the first two places
    assert table.facts == {"texts_read": 4, "places": 6}


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    target = target_of("a")
    (tmp_path / "v.txt").write_text("a 1 2\n")
    for config, said in (
        (VectorsConfig(name=str(tmp_path / "v.txt"), take="alone"), "--vectors.take has no effect on the file"),
        (VectorsConfig(take="contextual"), "--vectors.take contextual needs texts"),
        (VectorsConfig(occurrences=3), "--vectors.occurrences has no effect on --vectors.take input"),
    ):
        with pytest.raises(ConfigError, match=said):
            vectors_for(target, config)
    with pytest.raises(ConfigError, match="are both given"):
        load_target(VocabularyConfig(tokenizer="sample:minilm", words=tmp_path / "v.txt"))
    with pytest.raises(ConfigError, match="--vocabulary.size has no effect beside --vocabulary.words"):
        load_target(VocabularyConfig(words=tmp_path / "v.txt", size=5))


def test_the_tokenizer_of_a_model_gets_its_own_rows(tmp_path: Path, encoder: Encoder) -> None:
    encoder.model.save_pretrained(tmp_path / "model")
    encoder.tokenizer.save_pretrained(tmp_path / "model")
    target = load_target(VocabularyConfig(tokenizer=str(tmp_path / "model")))
    matrix = transfer(target, vectors_for(target, VectorsConfig(name=str(tmp_path / "model"))))
    own = encoder.model.get_input_embeddings().weight
    torch.testing.assert_close(matrix.weights[4:], own[4:].detach())
    assert [KINDS[kind] for kind in matrix.kinds[4:]] == ["exact"] * 5
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == target.tokenizer.get_vocab()
