"""Models and tokenizers: from a sample, a local folder or a hub id, with pretrained or random weights."""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from toolkit import samples
from toolkit.config import DecoderConfig, EncoderDecoderConfig, ImageModelConfig, ModelConfig
from toolkit.errors import ConfigError, ModelError
from toolkit.folders import refuse_strays
from toolkit.networks import architecture
from toolkit.sharing import once_a_node

AnyModelConfig = ModelConfig | DecoderConfig | EncoderDecoderConfig | ImageModelConfig
HUB_PATIENCE = 20.0
"""Seconds that the hub has to answer in."""
_OTHER_MODELS = f"Models that need no hub: {', '.join('sample:' + name for name in samples.names('model'))}."

Head = Literal["texts", "tokens", "spans"]
_HEADS: dict[Head, Any] = {
    "texts": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "spans": AutoModelForQuestionAnswering,
}

POSITION_TABLES = frozenset({"position_embeddings", "embed_positions", "positions_embed", "wpe"})
"""How the networks of transformers call the embedding of a token's place in its text, where they learn one."""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from.

    Attributes:
        name, revision, init: as in ModelConfig.
        drawn: names of those that were drawn from the seed, because there were none or of another size: a new head.
    """

    name: str
    revision: str | None
    init: str
    drawn: tuple[str, ...]


def load_tokenizer(config: AnyModelConfig, *, pads: bool = True) -> Any:
    """The tokenizer of the model, as transformers' fast tokenizer.

    Args:
        config: where the model lies.
        pads: whether it must have a padding token.

    Raises:
        ModelError: the model is not there, or has no tokenizer, or one without a padding token.
    """
    source, options = source_of(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "tokenizer", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 2:
        # For most architectures transformers makes one with next to no vocabulary where it finds no file of it.
        raise unreadable(config, "tokenizer", FileNotFoundError("its vocabulary is missing"))
    if pads and tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of --model.name {config.name} has no padding token",
            "Copy the model into a folder and name one there: `pad_token` in tokenizer_config.json and "
            "`pad_token_id` in config.json.",
        )
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # how this one was found has no place beside the model that is saved
    return tokenizer


def load_classifier(
    config: ModelConfig, labels: Sequence[str], *, seed: int, of: Head = "texts", problem: str | None = None
) -> nn.Module:
    """A network with one output for each label, in fp32 on the CPU: of a text, of each token, or the ends of a span.

    The head (and, with `init: random`, the whole network) is drawn from `seed`, so that all ranks hold the same. A
    head for another number of labels, from an earlier training, is replaced.

    Args:
        config: where the network is.
        labels: names of the outputs.
        seed: of what is drawn.
        of: what each has the outputs.
        problem: `problem_type` in the saved configuration, for those who read it; None for one class of a text.

    Raises:
        ModelError: the model is not there or cannot classify.
        ConfigError: `freeze` matches nothing, or everything.
    """
    load = functools.partial(_load_classifier, config, labels, _HEADS[of], {"problem_type": problem}, seed=seed)
    return once_a_node(repr((config, list(labels), seed, of, problem)), load)


def load_pretrained_image_classifier(
    config: ImageModelConfig, labels: Sequence[str], sizes: Mapping[str, int], *, seed: int
) -> nn.Module:
    """The same of images; `sizes` take the place of those in its configuration."""
    load = functools.partial(_load_classifier, config, labels, AutoModelForImageClassification, sizes, seed=seed)
    return once_a_node(repr((config, list(labels), sizes, seed)), load)


def _load_classifier(
    config: ModelConfig | ImageModelConfig, labels: Sequence[str], auto: Any, more: Mapping[str, Any], *, seed: int
) -> nn.Module:
    source, options = source_of(config)
    classes = dict(enumerate(labels))
    build: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attention}
    missing: Iterable[str] = ()
    try:
        if Path(source).is_dir():
            refuse_strays(Path(source))
        network = AutoConfig.from_pretrained(
            source,
            num_labels=len(labels),
            id2label=classes,
            label2id={label: index for index, label in classes.items()},
            **more,
            **options,
        )
        network.dtype = torch.float32
        if config.dropout is not None:
            set_dropout(network, config.dropout)
        torch.manual_seed(seed)
        if config.init == "random":
            model = auto.from_config(network, **build)
        else:
            model, report = auto.from_pretrained(
                source, config=network, ignore_mismatched_sizes=True, output_loading_info=True, **options, **build
            )
            missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "model", error) from error
    _check_body(config, model, missing)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = config.dropout
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = config.dropout
    freeze(model, config.freeze)
    model.origin = Origin(str(config.name), config.revision, config.init, tuple(sorted(missing)))
    return model  # type: ignore[no-any-return]


def origin_of(model: nn.Module) -> Origin | None:
    """Where `load_classifier` had a model from; None for one that was made otherwise."""
    return getattr(model, "origin", None)


def load_again(config: ModelConfig, network: PreTrainedConfig) -> nn.Module:
    """The model that a run began with, in fp32 on the CPU; a head that its source lacks is drawn anew.

    Args:
        config: where the weights are.
        network: of the run, with its architecture and its labels.

    Raises:
        ModelError: the model is not there, or is another one.
    """
    source, options = source_of(config)
    window = network.max_source_positions if network.model_type == "whisper" else None
    try:
        kind: Any = architecture((network.architectures or [""])[0])
        if window:  # the source has its own, of which the run took a part
            network = copy.deepcopy(network)
            network.max_source_positions = AutoConfig.from_pretrained(source, **options).max_source_positions
        with torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                source,
                config=network,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "model", error) from error
    _check_body(config, model, [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if window:
        shorten_window(model, window)
    return model.eval()  # type: ignore[no-any-return]


def shorten_window(model: Any, positions: int) -> None:
    """Let a Whisper model hear less: its encoder's positions are sinusoids, of which the first are left."""
    encoder = model.get_encoder()
    table = nn.Embedding(positions, encoder.embed_positions.embedding_dim)
    table.weight = nn.Parameter(encoder.embed_positions.weight[:positions].clone(), requires_grad=False)
    encoder.embed_positions, encoder.max_source_positions = table, positions
    model.config.max_source_positions = positions


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
    model.freezes = tuple(patterns)  # type: ignore[assignment]  # some networks have frozen parameters of their own
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("--model.freeze leaves nothing to train", "Freeze less.")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of all parameters and of the trainable ones."""
    parameters = list(model.parameters())
    return sum(map(true_size, parameters)), sum(p.numel() for p in parameters if p.requires_grad)


def true_size(parameter: torch.Tensor) -> int:
    """Elements of the weight that a parameter stands for: packed to 4 bits, it holds two or more in one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def input_limits(model: Any, max_length: int) -> dict[str, int | None]:
    """What a sample may hold, as keyword arguments of a task: the `vocabulary` and, as a length, the `positions`.

    Args:
        model: of transformers, not yet laid over the ranks.
        max_length: what texts were cut to; a longer sample is damaged, even where the model could take it.

    Raises:
        ConfigError: virtual tokens in front of such texts are more than the model has positions for.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    positions, virtual = learned_positions(model), getattr(model, "virtual_tokens", 0)
    if positions is None:
        return {"vocabulary": vocabulary, "positions": max_length}
    if virtual and max_length > positions - virtual:
        raise ConfigError(
            f"--adapter.virtual_tokens {virtual} in front of texts of --data.max_length {max_length} tokens are beyond "
            f"the {positions} positions that the model has",
            f"Use --data.max_length {positions - virtual}.",
        )
    return {"vocabulary": vocabulary, "positions": min(max_length, positions)}


def learned_positions(model: Any) -> int | None:
    """How many tokens a model has learned the places of; None where it computes them, for any number."""
    lengths = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count from behind the row of the padding; others have rows to spare.
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            lengths += [module.num_embeddings - behind, model.config.get_text_config().max_position_embeddings]
    return min(lengths, default=None)


def width(model: Any) -> int:
    """The hidden size of a model of transformers."""
    return int(model.config.get_text_config().hidden_size)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that make up the depth of a network: the children of its lists of two or more alike modules."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # from the outside inwards
        alike = isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(child) for child in module}) == 1
        if alike and module not in inside:
            for block in module.children():
                blocks.append(block)
                inside.update(block.modules())
    return blocks


def source_of(config: AnyModelConfig) -> tuple[str, dict[str, Any]]:
    """Where a model lies, and what `from_pretrained` is to be told beside."""
    assert config.name is not None, "a new network lies nowhere"
    source = locate(config.name)
    if Path(source).is_dir():
        if config.revision is not None:
            raise ConfigError("--model.revision has no effect on a folder or a sample", "Drop it, or name a hub id.")
        return source, {"trust_remote_code": False}
    has = _hub_has(source, config.revision)
    return source, {"trust_remote_code": False, "revision": config.revision, "local_files_only": not has}


def _hub_has(name: str, revision: str | None) -> bool:
    """Whether the hub answers for this model. transformers alone would ask a silent hub for minutes, file by file.

    Raises:
        ModelError: it answers that there is no such model or revision, or none for this user.
    """
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_PATIENCE / 2)
            answer.append(None)
        except Exception as error:  # handed over to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=ask, name="ask the hub", daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    if answer and isinstance(answer[0], (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)):
        raise ModelError(
            f"the hub has no model {name}{f' with revision {revision}' if revision else ''} for you: "
            f"{first_line(answer[0])}",
            f"Check --model.name and --model.revision. {_OTHER_MODELS}",
        )
    return answer == [None]


def _check_body(config: ModelConfig | ImageModelConfig, model: Any, missing: Iterable[str]) -> None:
    """Refuse weights that are not those of this network: only the head (and what pools for it) may be new."""
    body = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if body:
        raise ModelError(
            f"the weights of --model.name {config.name} lack {len(body)} tensors of the network that its config.json "
            f"describes, or hold them in other sizes: {', '.join(sorted(body)[:3])}, …",
            "Get the model again, or begin without its weights: --model.init random.",
        )


def set_dropout(network: PreTrainedConfig, dropout: float) -> None:
    """Set every rate in a network's configuration and in those inside of it."""
    for name, value in list(vars(network).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, dropout)
        # transformers names them hidden_dropout_prob, attention_dropout, classifier_dropout, resid_pdrop, … Those
        # that skip whole layers are switched off with them, but they are no dropout to be switched on.
        elif _is_rate(value) and (re.search("dropout|pdrop", name) or (dropout == 0 and re.search("layerdrop", name))):
            setattr(network, name, dropout)


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def unreadable(config: AnyModelConfig, what: str, error: Exception) -> ModelError:
    """That there is no such `what` under a model's name, and what to do."""
    return ModelError(
        f"no {what} could be loaded from --model.name {config.name}: {first_line(error)}",
        f"Name a folder with config.json, weights and a tokenizer, or a hub id that this machine can reach. "
        f"{_OTHER_MODELS}",
    )


def first_line(error: Exception) -> str:
    """What the error says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return f"{lines[0][:300]}" if lines else type(error).__name__
