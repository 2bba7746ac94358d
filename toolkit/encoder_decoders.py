"""Encoder–decoders: new ones of any size, and those that are there; the languages that those are told."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig

from toolkit.config import EncoderDecoderConfig
from toolkit.errors import ConfigError, ModelError, nearest
from toolkit.folders import refuse_strays
from toolkit.models import Origin, freeze, set_dropout, source_of, unreadable
from toolkit.sharing import once_a_node

_SIZES = ("layers", "hidden_size", "heads", "mlp_size")
"""What a new network reads, and one that is there has."""
_CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")


def load_encoder_decoder(config: EncoderDecoderConfig, tokenizer: Any, max_length: int, *, seed: int) -> nn.Module:
    """An encoder–decoder in fp32 on the CPU: with the weights of `config.name`, or drawn from `seed`.

    Where the tokenizer has been told a language of the targets, the model, and all that load what is saved of it,
    begin each text with the token of that language.

    Args:
        config: which, or how large a new one.
        tokenizer: its vocabulary must fit into the embedding; a new one is made for it.
        max_length: tokens of the longest text, of either side, that a new one is made for.
        seed: of new weights, so that all ranks hold the same.

    Raises:
        ModelError: the model is not there, is no encoder–decoder, or has too few embeddings for the tokenizer.
        ConfigError: sizes that do not go together or have no effect, or `freeze` matches nothing, or everything.
    """
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, getattr(tokenizer, "tgt_lang", None))
    load = functools.partial(_load, config, tokenizer, vocabulary, max_length, seed=seed)
    return once_a_node(repr((config, vocabulary, ids, max_length, seed)), load)


def tell_languages(tokenizer: Any, source: str | None, target: str | None) -> None:
    """Let a tokenizer of many languages put the tokens of these two where its model wants them.

    Raises:
        ConfigError: an unknown code, none where the tokenizer wants to be told, or one where it does not.
    """
    known = languages_of(tokenizer)
    for key, code in (("source_lang", source), ("target_lang", target)):
        if not known and code is not None:
            raise ConfigError(
                f"--data.{key} {code} has no effect: this tokenizer has no tokens of languages",
                "Drop it. A T5 is told by words, with --data.prefix.",
            )
        if known and code is None:
            raise ConfigError(
                f"this tokenizer is of {len(known)} languages, and --data.{key} does not say which",
                f"Give its code, as {', '.join(known[:4])}, …",
            )
        if known and code not in known:
            raise ConfigError(
                f"--data.{key} {code}: the tokenizer knows no such language.{nearest(str(code), known)}",
                f"It knows {', '.join(known)}.",
            )
    if known:
        tokenizer.tgt_lang, tokenizer.src_lang = target, source


def languages_of(tokenizer: Any) -> list[str]:
    """The codes of the languages that a tokenizer has tokens for (NLLB, mBART-50, M2M100); none for others."""
    if not hasattr(tokenizer, "src_lang"):
        return []
    named = getattr(tokenizer, "lang_code_to_token", None)
    return sorted(named or filter(_CODE.fullmatch, map(str, tokenizer.all_special_tokens)))


def language_token(tokenizer: Any) -> int | None:
    """The token that begins a target, by the language that the tokenizer has been told; None where there is none."""
    code = getattr(tokenizer, "tgt_lang", None)
    if code is None:
        return None
    name = getattr(tokenizer, "lang_code_to_token", {}).get(code, code)
    return int(tokenizer.convert_tokens_to_ids(name))


def start_token(model: nn.Module) -> int:
    """What a decoder is given before the first token of a text.

    Raises:
        ModelError: its configuration does not say.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        if (token := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(token)
    raise ModelError(
        "the model's configuration does not say with which token its decoder starts",
        "Write `decoder_start_token_id` into its config.json.",
    )


def _load(config: EncoderDecoderConfig, tokenizer: Any, vocabulary: int, max_length: int, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    build: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attention}
    if config.name is None:
        network = _new_network(config, tokenizer, vocabulary, max_length)
        model: Any = AutoModelForSeq2SeqLM.from_config(network, **build)
        model.origin = Origin("", None, "random", ())
    else:
        model = _pretrained(config, build)
        model.origin = Origin(config.name, config.revision, "pretrained", ())
        rows = model.get_input_embeddings().num_embeddings
        if vocabulary > rows:
            raise ModelError(
                f"the tokenizer has {vocabulary} tokens, and --model.name {config.name} embeddings for {rows}",
                "Take the model's own tokenizer.",
            )
    language = language_token(tokenizer)
    if language is not None:
        model.generation_config.forced_bos_token_id = language
    freeze(model, config.freeze)
    return model  # type: ignore[no-any-return]


def _new_network(config: EncoderDecoderConfig, tokenizer: Any, vocabulary: int, max_length: int) -> PreTrainedConfig:
    if config.revision is not None:
        raise ConfigError("--model.revision has no effect without --model.name", "Drop it, or name a hub id.")
    if config.hidden_size % config.heads:
        raise ConfigError(
            f"--model.hidden_size {config.hidden_size} is no multiple of --model.heads {config.heads}",
            "The width is divided among the heads.",
        )
    mlp_size, heads = config.mlp_size or 4 * config.hidden_size, config.heads
    network = AutoConfig.for_model(
        "mbart",
        vocab_size=vocabulary,
        d_model=config.hidden_size,
        encoder_layers=config.layers,
        decoder_layers=config.layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=mlp_size,
        decoder_ffn_dim=mlp_size,
        max_position_embeddings=max_length,
        scale_embedding=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    network.dtype = torch.float32
    if config.dropout is not None:
        set_dropout(network, config.dropout)
    return network


def _pretrained(config: EncoderDecoderConfig, build: dict[str, Any]) -> Any:
    unset = EncoderDecoderConfig()
    for key in _SIZES:
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
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            source, config=network, output_loading_info=True, **options, **build
        )
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "encoder–decoder", error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights of --model.name {config.name} lack {len(missing)} tensors of an encoder–decoder: "
            f"{', '.join(missing[:3])}, …",
            "Name an encoder–decoder for text.",
        )
    return model
