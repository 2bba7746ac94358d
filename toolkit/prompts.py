"""Virtual tokens over PEFT: a trained prompt in front of each text, or trained keys and values in front of a block's.

PEFT keeps them in a model around the model. Here hooks give the model itself what PEFT's would give it, and drop what
it says of the virtual tokens, so tasks, wrappers and generation see the tokens and logits that they know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from toolkit.compute.cross_entropy import IGNORED
from toolkit.compute.host import on_device, on_host
from toolkit.compute.padding_free import TOLERANCE, short_texts
from toolkit.config import AdapterConfig, TrainConfig
from toolkit.errors import ConfigError
from toolkit.models import learned_positions

PROMPTS = ("prompt", "prefix")
"""The adapters that are virtual tokens."""
VIRTUAL_TOKENS = 20
LEAST = 9
"""Tokens of a text that there must be room for: as many as models are tried with."""
OTHERWISE = "Train an adapter in the layers (--adapter.name lora)."


def check_prompt(config: AdapterConfig, train: TrainConfig) -> None:
    """Refuse ways of training that virtual tokens do not go with.

    Raises:
        ConfigError: naming the reason and the remedy.
    """
    again = "a block that is computed again would find the keys and values of its first time in front"
    reasons = {
        "activation_checkpointing": again if config.name == "prefix" else "",
        "compile": "no test covers compiled blocks behind virtual tokens",
        "cuda_graphs": "where the texts lie behind virtual tokens is known to no graph",
    }
    for key, reason in reasons.items():
        if config.name in PROMPTS and reason and getattr(train, key) not in ("none", False):
            raise ConfigError(f"--train.{key} does not work with --adapter.name {config.name}: {reason}", "Drop one.")


def prompt_config(peft: Any, model: Any, config: AdapterConfig, whole: list[str]) -> Any:
    """PEFT's configuration of the virtual tokens, as its folders have it.

    Raises:
        ConfigError: this model cannot be given them.
    """
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ConfigError(f"--adapter.name {config.name}: {type(model).__name__} does not read one text", OTHERWISE)
    writes, count = model.get_output_embeddings() is not None, config.virtual_tokens or VIRTUAL_TOKENS
    if (positions := learned_positions(model)) is not None and count > positions - LEAST:
        raise ConfigError(
            f"--adapter.virtual_tokens {count} leaves no room for a text: the model has {positions} positions",
            f"Use {positions - LEAST} at most.",
        )
    common = {
        "task_type": "CAUSAL_LM" if writes else "SEQ_CLS",
        "num_virtual_tokens": count,
        "num_transformer_submodules": 1,
        "modules_to_save": whole or None,
    }
    if config.name == "prompt":
        made = peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **common)
    elif not writes:
        raise ConfigError(
            f"--adapter.name prefix: {type(model).__name__} keeps no keys and values, as language models do, in front "
            "of which others could stand",
            "Use --adapter.name prompt, or an adapter in the layers (lora).",
        )
    elif _windows(model.config.get_text_config()):
        raise ConfigError(
            f"--adapter.name prefix: the attention of {type(model).__name__} looks back no further than a window, and "
            "would lose sight of what stands in front",
            OTHERWISE,
        )
    else:
        made = peft.PrefixTuningConfig(**common)
    return peft.utils._prepare_prompt_learning_config(made, model.config)


def add_virtual_tokens(model: Any, config: Any, encoder: Any = None) -> None:
    """Put virtual tokens in front of all that `model` reads; whatever else it has stays as it is.

    Args:
        model: of transformers; it gets a `prompt_encoder`, which holds them, and says how many `virtual_tokens` it has.
        config: from `prompt_config`, or of a saved adapter.
        encoder: PEFT's, of a saved adapter; else one is drawn, for a prompt from the embeddings of the vocabulary.

    Raises:
        ConfigError: the model's answer to a text would depend on the padding beside it.
    """
    import peft

    if encoder is None and config.peft_type == "PROMPT_TUNING":
        encoder = peft.PromptEmbedding(config, model.get_input_embeddings())
    elif encoder is None:
        encoder = peft.PrefixEncoder(config)
    model.prompt_encoder = encoder
    model.virtual_tokens = config.num_virtual_tokens
    model.peft_config = {"default": config}
    _VirtualTokens(model, config)
    if config.task_type == "SEQ_CLS" and (difference := _moved_by_padding(model)) > TOLERANCE:
        raise ConfigError(
            f"--adapter.name prompt: {type(model).__name__} looks for the end of a text in its token ids, and virtual "
            f"tokens have none: padding would change its answers by {difference:.1e}",
            OTHERWISE,
        )


def prompt_state(model: Any, whole: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The virtual tokens, and the modules that are trained whole, by the names that PEFT's files have for them."""
    state = {"prompt_embeddings": model.prompt_encoder.embedding.weight}
    for name in whole:
        module = model.get_submodule(name)
        state |= {f"base_model.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return {name: tensor.detach() for name, tensor in state.items()}


class _VirtualTokens:
    """The hooks on a model.

    They are given the tokens of a text alone, also while it is generated: the cache, which holds more, tells when
    virtual tokens are there already.
    """

    def __init__(self, model: Any, config: Any) -> None:
        self._count, self._prefix = config.num_virtual_tokens, config.peft_type == "PREFIX_TUNING"
        self._blocks, self._heads = config.num_layers, config.num_attention_heads
        # Before all others, which must see what the model will: what is padding, and which labels there are.
        model.register_forward_pre_hook(self._put_in_front, with_kwargs=True, prepend=True)
        if not self._prefix:
            model.register_forward_hook(self._drop, with_kwargs=True)

    def _put_in_front(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids, mask, cache = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        assert ids is not None, "a model with virtual tokens is given token ids, by name"
        there = cache is not None and cache.get_seq_length() > 0
        more = {"attention_mask": self._longer(torch.ones_like(ids) if mask is None else mask, 1)}
        places = torch.arange(self._count, device=ids.device)
        if (positions := kwargs.get("position_ids")) is not None:
            in_front = [] if there or self._prefix else [places.expand(len(ids), -1)]
            more["position_ids"] = torch.cat([*in_front, positions + self._count], 1)
        if there:
            return args, kwargs | more
        virtual = model.prompt_encoder(places[None]).expand(len(ids), -1, -1)
        if self._prefix:
            return args, kwargs | more | {"past_key_values": self._filled(cache, virtual)}
        if (labels := kwargs.get("labels")) is not None:
            more["labels"] = self._longer(labels, IGNORED)
        embedded = model.get_input_embeddings()(ids)
        more["inputs_embeds"] = torch.cat([virtual.to(embedded.dtype), embedded], 1)
        return args, {name: value for name, value in kwargs.items() if name != "input_ids"} | more

    def _drop(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The logits of virtual tokens, where each token has some."""
        embedded, logits = kwargs.get("inputs_embeds"), output.logits
        if embedded is not None and logits.ndim == 3 and logits.shape[1] == embedded.shape[1]:
            output.logits = logits[:, self._count :]

    def _longer(self, of_tokens: torch.Tensor, value: int) -> torch.Tensor:
        """(texts, length) with a value for each virtual token; the host knows it where it knew the shorter one."""
        return on_device(F.pad(on_host(of_tokens), (self._count, 0), value=value), of_tokens.device)

    def _filled(self, cache: Any, virtual: torch.Tensor) -> Any:
        """A cache with (texts, virtual tokens, keys and values of each block in turn), as PEFT lays them out."""
        texts, count, _ = virtual.shape
        laid = virtual.view(texts, count, self._blocks, 2, self._heads, -1).permute(2, 3, 0, 4, 1, 5)
        cache = DynamicCache() if cache is None else cache
        for block, (keys, values) in enumerate(laid):
            cache.update(keys, values, block)
        return cache


def _windows(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) or kinds != {"full_attention"}


@torch.no_grad()
def _moved_by_padding(model: Any) -> float:
    """Largest difference of a logit of short texts to those of each text alone, relative to the largest."""
    training = model.training
    inputs = short_texts(model.config)
    model.eval()
    together = model(**inputs).logits
    lengths = inputs["attention_mask"].sum(1).tolist()
    alone = [
        model(**{name: value[row : row + 1, :length] for name, value in inputs.items()}).logits[0]
        for row, length in enumerate(lengths)
    ]
    model.train(training)
    return float((together - torch.stack(alone)).abs().max() / together.abs().max().clamp(min=1e-6))
