"""A model and its tokenizer as one file, and the proof that what was written is what was trained."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from toolkit.checkpoint.export import answer, quiet_libraries
from toolkit.errors import CheckpointError
from toolkit.gguf.architectures import Piece, architecture_of, describe, pieces
from toolkit.gguf.vocabulary import Vocabulary
from toolkit.merge import BOUNDS as MERGED
from toolkit.merge import QUANTIZED_BOUNDS

BOUNDS = {"f32": MERGED["fp32"], "f16": MERGED["fp16"], "bf16": MERGED["bf16"], "q8_0": QUANTIZED_BOUNDS["int8"]}
"""Largest difference of a logit, relative to the largest logit (or to 1), by type of the weights."""

TEXTS = (
    "The government's plan has cut 25 taxes since 1998, hasn't it?",
    "新华社北京1月1日电：我国经济稳步增长，人民生活不断改善。",
    "naïve café, 3.14 €\n\n\tfor i in range(10):  # 🙂\n\t\tprint(i)",
)
"""What the tokenizer is proved on."""

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_SMALL = (gguf.MODEL_TENSOR.POS_EMBD, gguf.MODEL_TENSOR.ROPE_FREQS)
"""Kept in fp32: readers compute with them as they are."""


@dataclass(frozen=True)
class Written:
    """What a file holds.

    Attributes:
        tensors, parameters: how many, and their elements.
        types: of the tensors, with their number.
    """

    tensors: int
    parameters: int
    types: Mapping[str, int]


@dataclass(frozen=True)
class Proof:
    """What was found when a file was read again.

    Attributes:
        difference: largest absolute difference of a logit.
        bound: that it may not exceed.
    """

    difference: float
    bound: float


def size_of(model: PreTrainedModel, dtype: str) -> int:
    """Bytes of the weights in a file."""
    return sum(_bytes(piece, dtype) for piece in pieces(model))


def write(
    path: Path,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    name: str,
    dtype: str,
    advance: Callable[[int], object] = lambda written: None,
) -> Written:
    """Write a file, a tensor at a time.

    Args:
        path: a new file, which is there in part while it is written.
        model: plain, on the CPU.
        vocabulary: of the model.
        name: of the model, for those who look into the file.
        dtype: of all weights that are no vectors: `f32`, `f16`, `bf16` or `q8_0`.
        advance: told the bytes of each tensor.

    Raises:
        ModelError: GGUF has no place for the model.
    """
    known = architecture_of(model.config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[known.kind])
    parts = list(pieces(model))
    parameters = sum(piece.tensor.numel() for piece in parts)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, model.config)
    vocabulary.describe(writer)
    types = [_type(piece, dtype) for piece in parts]
    for piece, kind in zip(parts, types, strict=True):
        writer.add_tensor_info(piece.name, piece.tensor.shape, np.dtype(np.float32), _bytes(piece, dtype), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, kind in zip(parts, types, strict=True):
            with np.errstate(over="ignore"):  # what is beyond fp16 becomes infinite, which the proof finds
                writer.write_tensor_data(gguf.quantize(piece.values(), kind))
            advance(_bytes(piece, dtype))
    finally:
        writer.close()
    return Written(len(parts), parameters, Counter(kind.name.lower() for kind in types))


def prove(
    path: Path, model: PreTrainedModel, tokenizer: Any, expected: torch.Tensor, probe: Mapping[str, Any], dtype: str
) -> Proof:
    """Let transformers read a file, and compare what it makes of it with what the file was made from.

    The sizes that the model is built with are those that the file states, as far as transformers reads them.

    Args:
        path: of the file, in a folder of its own.
        model: says what transformers does not read from files.
        tokenizer: must make the same tokens of some texts.
        expected: answer to the probe of the model that was to be written.
        probe: a batch.
        dtype: of the weights, which sets the bound.

    Raises:
        CheckpointError: the file cannot be read, splits a text otherwise, or a logit differs by more than the bound.
    """
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    known = architecture_of(model.config)
    try:
        with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):  # bars that no setting switches off
            words = AutoTokenizer.from_pretrained(path.parent, **source)
            config = AutoConfig.from_pretrained(path.parent, **source)
            for name in known.unread:
                setattr(config, name, getattr(model.config, name))
            if getattr(model.config, "rope_parameters", {}).get("rope_type", "default") != "default":
                config.rope_parameters = model.config.rope_parameters
            again, report = type(model).from_pretrained(
                path.parent,
                config=config,
                dtype=torch.float32,
                attn_implementation=model.config._attn_implementation,
                output_loading_info=True,
                **source,
            )
    except Exception as error:  # whatever it is, the file is of no use
        raise CheckpointError(f"the file cannot be read again: {error}", _DEFECT) from error
    if lacking := report["missing_keys"]:
        raise CheckpointError(f"the file lacks weights: {', '.join(sorted(lacking)[:3])}", _DEFECT)
    for text in TEXTS:
        if (read := _ids(words, text)) != (meant := _ids(tokenizer, text)):
            raise CheckpointError(f"of {text!r} the file makes the tokens {read}, not {meant}", _DEFECT)
    bound = BOUNDS[dtype] * max(1.0, float(expected.abs().max()))
    difference = float((answer(again.eval(), probe) - expected).abs().max())
    if not difference <= bound:  # a difference that is not a number is no small one
        raise CheckpointError(
            f"written in {dtype}, the model answers otherwise: its logits differ by up to {difference:.3g}, and the "
            f"bound is {bound:.3g}",
            "Nothing was kept of it. Take a wider --dtype: bf16 holds larger numbers than f16, f32 rounds nothing.",
        )
    return Proof(difference, bound)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _type(piece: Piece, dtype: str) -> GGMLQuantizationType:
    """Vectors stay in fp32, and rows that are no multiple of the blocks of `q8_0` in fp16."""
    if piece.tensor.dim() == 1 or piece.role in _SMALL:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[dtype.upper()]
    return GGMLQuantizationType.F16 if piece.tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _bytes(piece: Piece, dtype: str) -> int:
    return math.prod(quant_shape_to_byte_shape(piece.tensor.shape, _type(piece, dtype)))


_DEFECT = "Nothing was kept of it. This is a defect of the toolkit or of transformers: report it."
