"""Models and tokenizers: from a sample, a local folder or a hub id, with pretrained or random weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from toolkit import samples
from toolkit.config import ModelConfig
from toolkit.errors import ConfigError, ModelError


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the model, as transformers' fast tokenizer.

    Raises:
        ModelError: the model is not there, or has no tokenizer, or one without a padding token.
    """
    source = locate(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(config, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of --model.name {config.name} has no padding token")
    return tokenizer


def load_classifier(config: ModelConfig, labels: Sequence[str], *, seed: int) -> nn.Module:
    """A sequence classifier with one output for each label, in fp32 on the CPU.

    The head (and, with `init: random`, the whole network) is drawn from `seed`, so that all ranks hold the same.

    Raises:
        ModelError: the model is not there or cannot classify.
        ConfigError: `freeze` matches nothing, or everything.
    """
    source = locate(config.name)
    classes = dict(enumerate(labels))
    try:
        network = AutoConfig.from_pretrained(
            source,
            revision=config.revision,
            num_labels=len(labels),
            id2label=classes,
            label2id={label: index for index, label in classes.items()},
        )
        network.dtype = torch.float32
        if config.dropout is not None:
            _set_dropout(network, config.dropout)
        options = {"attn_implementation": config.attention, "dtype": torch.float32}
        torch.manual_seed(seed)
        if config.init == "random":
            model = AutoModelForSequenceClassification.from_config(network, **options)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                source, revision=config.revision, config=network, **options
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(config, "model", error) from error
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    freeze(model, config.freeze)
    return model  # type: ignore[no-any-return]


def locate(name: str) -> str:
    """The folder of `sample:NAME`, or a folder that exists, or a hub id as it stands.

    Raises:
        ModelError: a path that is not there, or is no folder.
    """
    if name.startswith("sample:"):
        sample = samples.SAMPLES.get(name.removeprefix("sample:"))
        if sample is not None and sample.kind != "model":
            raise ModelError(
                f"--model.name {name} is a data sample, not a model",
                f"Models: {', '.join('sample:' + known for known in samples.names('model'))}.",
            )
        return str(samples.fetch(name.removeprefix("sample:")))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(f"--model.name {name} is a file", "Name the folder that holds config.json.")
    # A hub id is `name` or `owner/name`: whatever else looks like a path is one that is missing.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"--model.name {name}: there is no such folder", "Check the path.")
    return name


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names one of the regular expressions matches."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        try:
            matched = [name for name in parameters if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"--model.freeze {pattern!r} is not a regular expression: {error}") from error
        if not matched:
            some = ", ".join(list(parameters)[:5])
            raise ConfigError(f"--model.freeze {pattern!r} matches no parameter", f"Parameters begin: {some}, …")
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("--model.freeze leaves nothing to train", "Freeze less.")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of all parameters and of the trainable ones."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that make up the depth of a network: the children of its lists of two or more alike modules."""
    blocks: list[nn.Module] = []
    for module in model.modules():
        children = list(module) if isinstance(module, nn.ModuleList) else []
        nested = any(child is block for child in children for block in blocks)
        inside = any(module is inner for block in blocks for inner in block.modules())
        if len(children) > 1 and len({type(child) for child in children}) == 1 and not nested and not inside:
            blocks.extend(children)
    return blocks


def _set_dropout(network: Any, dropout: float) -> None:
    # transformers names them hidden_dropout_prob, attention_dropout, classifier_dropout, resid_pdrop, …
    for name, value in vars(network).items():
        is_rate = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if is_rate and re.search(r"dropout|pdrop|drop_path|layerdrop", name):
            setattr(network, name, dropout)


def _unreadable(config: ModelConfig, what: str, error: Exception) -> ModelError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"no {what} could be loaded from --model.name {config.name}: {first}",
        "Name a folder with config.json, weights and a tokenizer, a hub id that this machine can reach, or one of "
        + ", ".join("sample:" + name for name in samples.names("model"))
        + ".",
    )
