"""Which networks have a place in GGUF, and how theirs are called, laid out and described there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.errors import ModelError

_GATED = {"hidden_act": ("silu",)}
_QWEN = _GATED | {"use_sliding_window": (False,)}


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file can hold of a network.

    Attributes:
        kind: its name there.
        settings: of the configuration, with the values that a reader of the file computes with: it has none to choose.
        turned: whether the rows of query and key are interleaved there, for another form of the rotary embedding.
        unread: attributes of the configuration that stand in a file, but that transformers does not read from it.
        scalings: types of rotary scaling that a reader knows.
    """

    kind: MODEL_ARCH
    settings: Mapping[str, tuple[object, ...]]
    turned: bool = False
    unread: tuple[str, ...] = ()
    scalings: tuple[str, ...] = field(default=("default", "linear", "yarn"))


ARCHITECTURES = {
    "gpt2": Architecture(
        MODEL_ARCH.GPT2,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        unread=("n_positions", "n_inner"),
    ),
    "llama": Architecture(
        MODEL_ARCH.LLAMA,
        _GATED,
        turned=True,
        unread=("attention_bias", "mlp_bias"),  # other readers look whether the biases are there
        scalings=("default", "linear", "llama3", "yarn"),
    ),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, _QWEN),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, _QWEN | {"attention_bias": (False,)}, unread=("head_dim",)),
}
"""By transformers' name of the type of model."""

_YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True}
"""What a reader of the file takes for settings of YaRN that it does not find there."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """What is known of a network.

    Raises:
        ModelError: nothing, or it computes otherwise than readers of GGUF do.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ModelError(
            f"a model of type {config.model_type} cannot be written as GGUF by this command",
            f"It knows these types of models: {', '.join(ARCHITECTURES)}.",
        )
    for name, values in known.settings.items():
        if getattr(config, name, values[0]) not in values:
            raise _unreadable(config, f"{name} = {getattr(config, name)}")
    rope = _rope(config)
    if rope["rope_type"] not in known.scalings:
        raise _unreadable(config, f"rotary scaling of type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _unreadable(config, "a rotary embedding of a part of each head")
    if rope["rope_type"] == "yarn":
        for name, value in _YARN.items():
            if rope.get(name, value) != value:
                raise _unreadable(config, f"{name} = {rope[name]} of YaRN")
    return known


def describe(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Enter the sizes of a network."""
    width, heads = config.hidden_size, config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    of_a_head = getattr(config, "head_dim", None) or width // heads
    writer.add_key_length(of_a_head)
    writer.add_value_length(of_a_head)
    writer.add_rope_dimension_count(of_a_head)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


@dataclass(frozen=True)
class Piece:
    """A tensor of a file.

    Attributes:
        name: there.
        tensor: as it lies there, but for the order of rows that are to be interleaved.
        role: what it is to the network.
        heads: whose rows are to be interleaved; 0 for none.
    """

    name: str
    tensor: torch.Tensor
    role: MODEL_TENSOR
    heads: int = 0

    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """In fp32, in the order of the file."""
        rows = self.tensor
        if self.heads:
            # transformers rotates the first half of a head's rows with the second, GGUF's readers each with the next.
            rows = rows.reshape(self.heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        return np.ascontiguousarray(rows.float().numpy())


def pieces(model: PreTrainedModel) -> Iterator[Piece]:
    """The tensors of a model, each once: readers take a missing output layer to be the table of the embedding.

    Raises:
        ModelError: one has no place in a file.
    """
    config = model.config
    known = architecture_of(config)
    names = gguf.get_tensor_name_map(known.kind, config.num_hidden_layers)
    # Conv1D holds the transpose of what other linear layers hold.
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    turned: dict[MODEL_TENSOR, int] = {}
    if known.turned:
        turned = {MODEL_TENSOR.ATTN_Q: config.num_attention_heads, MODEL_TENSOR.ATTN_K: config.num_key_value_heads}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        found = names.get_type_and_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"{name} has no place in a GGUF file", "Take a model without it.")
        role, place = found
        yield Piece(place, tensor.T if name in transposed else tensor, role, turned.get(role, 0))
    if _rope(config)["rope_type"] == "llama3":
        yield Piece("rope_freqs.weight", _slower(model), MODEL_TENSOR.ROPE_FREQS)


def _slower(model: Any) -> torch.Tensor:
    """By how much each frequency of the rotary embedding is slower than it would be without scaling."""
    scaled: torch.Tensor = model.get_decoder().rotary_emb.inv_freq.double()
    steps = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = torch.exp(-math.log(_rope(model.config)["rope_theta"]) * steps)
    return (plain / scaled).float()


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """What the configuration says of the rotary embedding; for networks without one, that nothing is scaled."""
    return {"rope_type": "default"} | (getattr(config, "rope_parameters", None) or {})


def _unreadable(config: PreTrainedConfig, what: str) -> ModelError:
    return ModelError(
        f"this {config.model_type} has {what}, which readers of GGUF files would not heed",
        "Use it with transformers (`toolkit predict`), or train one without that.",
    )
