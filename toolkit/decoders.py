"""Causal language models: new ones of any size, and those that are there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from toolkit.config import DecoderConfig, ModelConfig
from toolkit.errors import ConfigError, ModelError
from toolkit.folders import refuse_strays
from toolkit.models import Origin, first_line, freeze, set_dropout, source_of, unreadable
from toolkit.sharing import once_a_node

_SIZES = ("architecture", "layers", "hidden_size", "heads", "kv_heads", "mlp_size", "rope_theta", "tie_embeddings")
"""What a new decoder reads, and one that is there has."""


def load_decoder(config: DecoderConfig | ModelConfig, tokenizer: Any, max_length: int, *, seed: int) -> nn.Module:
    """A causal language model in fp32 on the CPU: with the weights of `config.name`, or drawn from `seed`.

    Args:
        config: which, or how large a new one.
        tokenizer: its vocabulary must fit into the embedding; a new one is made for it.
        max_length: tokens of the longest text that a new one is made for.
        seed: of new weights, so that all ranks hold the same.

    Raises:
        ModelError: the model is not there, is no language model, or has too few embeddings for the tokenizer.
        ConfigError: sizes that do not go together or have no effect, or `freeze` matches nothing, or everything.
    """
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    load = functools.partial(_load_decoder, config, tokenizer, vocabulary, max_length, seed=seed)
    return once_a_node(repr((config, vocabulary, marks, max_length, seed)), load)


def _load_decoder(
    config: DecoderConfig | ModelConfig, tokenizer: Any, vocabulary: int, max_length: int, *, seed: int
) -> nn.Module:
    torch.manual_seed(seed)
    build: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attention}
    if isinstance(config, DecoderConfig) and config.name is None:
        origin = Origin("", None, "random", ())
        network = _new_decoder(config, tokenizer, vocabulary, max_length)
        try:
            model = AutoModelForCausalLM.from_config(network, **build)
        except (ImportError, ValueError) as error:
            raise ModelError(f"this network cannot be built: {first_line(error)}", "Change --model.*.") from error
    else:
        origin = Origin(str(config.name), config.revision, getattr(config, "init", "pretrained"), ())
        model = _pretrained_decoder(config, build)
        rows = model.get_input_embeddings().num_embeddings
        if vocabulary > rows:
            raise ModelError(
                f"the tokenizer has {vocabulary} tokens, and --model.name {config.name} embeddings for {rows}",
                "Take the model's own tokenizer.",
            )
    model.origin = origin
    freeze(model, config.freeze)
    return model  # type: ignore[no-any-return]


def stop_at(model: nn.Module, token: int) -> None:
    """Let a model, and all that load what is saved of it, end its answers at a token, beside those that it knows."""
    generation: Any = model.generation_config
    known = generation.eos_token_id
    ends = [*(known if isinstance(known, list) else [] if known is None else [known])]
    if token not in ends:
        generation.eos_token_id = [*ends, token]


def _new_decoder(config: DecoderConfig, tokenizer: Any, vocabulary: int, max_length: int) -> PreTrainedConfig:
    if config.revision is not None:
        raise ConfigError("--model.revision has no effect without --model.name", "Drop it, or name a hub id.")
    gated = config.architecture != "gpt2"
    unread = {} if gated else {"kv_heads": config.kv_heads, "rope_theta": config.rope_theta}
    if key := next((key for key, value in unread.items() if value != getattr(DecoderConfig(), key)), None):
        raise ConfigError(f"--model.{key} has no effect on --model.architecture gpt2", "Drop it, or take llama.")
    kv_heads = config.kv_heads or config.heads
    if config.hidden_size % config.heads or config.heads % kv_heads:
        raise ConfigError(
            f"--model.hidden_size {config.hidden_size}, heads {config.heads}, kv_heads {kv_heads} do not go together",
            "The width must be a multiple of the heads, and these of those of keys and values.",
        )
    by_width = -(-config.hidden_size * 8 // 3 // 64) * 64 if gated else 4 * config.hidden_size
    network = AutoConfig.for_model(
        config.architecture,
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"intermediate_size" if gated else "n_inner": config.mlp_size or by_width}),
        **({"num_key_value_heads": kv_heads, "head_dim": config.hidden_size // config.heads} if gated else {}),
        **({"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}} if gated else {}),
    )
    network.dtype = torch.float32
    if config.dropout is not None:
        set_dropout(network, config.dropout)
    return network


def _pretrained_decoder(config: DecoderConfig | ModelConfig, build: Mapping[str, Any]) -> Any:
    unset = DecoderConfig()
    for key in _SIZES if isinstance(config, DecoderConfig) else ():
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(
                f"--model.{key} has no effect on the weights of --model.name {config.name}, whose sizes are its own",
                "Drop one of the two.",
            )
    source, options = source_of(config)
    try:
        if Path(source).is_dir():
            refuse_strays(Path(source))
        network = AutoConfig.from_pretrained(source, **options)
        network.dtype = torch.float32
        if config.dropout is not None:
            set_dropout(network, config.dropout)
        if isinstance(config, ModelConfig) and config.init == "random":
            return AutoModelForCausalLM.from_config(network, **build)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=network, output_loading_info=True, **options, **build
        )
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "language model", error) from error
    if report["missing_keys"]:
        raise ModelError(
            f"the weights of --model.name {config.name} lack {len(report['missing_keys'])} tensors of a language "
            f"model: {', '.join(sorted(report['missing_keys'])[:3])}, …",
            "Name a causal language model.",
        )
    return model
