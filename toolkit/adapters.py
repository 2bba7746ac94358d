"""Adapters over PEFT: few new weights in a frozen network, and folders of them that plain PEFT loads.

The layers, or virtual tokens, are put into the model itself, which stays what it was for all that wraps it or looks
into it. PEFT is imported when an adapter is asked for: it takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from toolkit.config import AdapterConfig, ModelConfig, plain, validate
from toolkit.errors import CheckpointError, ConfigError, ModelError, nearest
from toolkit.models import load_again, origin_of
from toolkit.prompts import PROMPTS, VIRTUAL_TOKENS, add_virtual_tokens, prompt_config, prompt_state
from toolkit.quantization import PLAIN, LowBit, is_quantized, quantize, round_weights, rounding_errors

FILE = "adapter.json"
"""What stands beside a saved adapter, and beside the configuration of its run: an `Adapter`."""
WEIGHTS = "adapter_model.safetensors"

_ALL = frozenset({"rank", "alpha", "dropout", "targets", "lr_ratio", "train"})
READS = {
    "none": frozenset[str](),
    **dict.fromkeys(("lora", "rslora", "dora", "pissa", "loftq"), _ALL),
    "ia3": frozenset({"targets", "train"}),
    **dict.fromkeys(PROMPTS, frozenset({"virtual_tokens"})),
}
"""The settings that each adapter reads."""
RANK = 16
NOT_QUANTIZED = {
    "none": "low-bit weights are frozen, and there would be nothing to train",
    "pissa": "it begins with the singular values of a weight, takes them out of it, and needs both in full precision",
}
"""Adapters that have no place on quantized layers, and why."""
QUANTIZED = {"loftq": "it begins with what rounding takes from the weights, and nothing is rounded"}
"""Adapters that have no place on others."""
QUANTIZE = "Add --quantization nf4, or use --adapter.name lora."
ADAPT_OTHERWISE = "Train an adapter that has (--adapter.name lora), or drop --quantization."


@dataclass(frozen=True)
class Adapter:
    """What was added to a model, and to which.

    Attributes:
        config, seed: as asked for.
        base, revision: where the frozen weights came from, as in ModelConfig; empty for a model made in memory.
        fingerprint: SHA-256 of the weights that the adapter is for: all but the modules that are trained whole.
        layers: names of those with an adapter; none for virtual tokens.
        whole: names of the modules that are trained whole.
        quantization: of the other linear layers, while the adapter was trained.
    """

    config: AdapterConfig
    seed: int
    base: str
    revision: str | None
    fingerprint: str
    layers: tuple[str, ...]
    whole: tuple[str, ...]
    quantization: str = "none"

    def write(self, folder: Path) -> None:
        """Into a file that `read_adapter` reads."""
        (folder / FILE).write_text(json.dumps(plain(self), indent=1) + "\n", encoding="utf-8")

    def describe(self) -> str:
        """For the plan: what matched."""
        # Those of all blocks as one.
        alike = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in self.whole)
        whole = f"; whole: {', '.join(alike)}" if alike else ""
        if self.config.name in PROMPTS:
            return f"{self.config.name} of {self.config.virtual_tokens or VIRTUAL_TOKENS} virtual tokens{whole}"
        kinds = Counter(name.rpartition(".")[2] for name in self.layers)
        there = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        rank = "" if self.config.name == "ia3" else f" of rank {self.config.rank or RANK}"
        return f"{self.config.name}{rank} in {len(self.layers)} layers ({there}){whole}"


def check_adapter(config: AdapterConfig) -> None:
    """Refuse settings that the adapter does not read.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    unset = AdapterConfig()
    for key in (field.name for field in dataclasses.fields(AdapterConfig)):
        if key not in ("name", *READS[config.name]) and getattr(config, key) != getattr(unset, key):
            readers = ", ".join(name for name, reads in READS.items() if key in reads)
            raise ConfigError(
                f"--adapter.{key} has no effect with --adapter.name {config.name}",
                f"Drop it, or choose an adapter that reads it: {readers}.",
            )
    if not config.targets:
        raise ConfigError("--adapter.targets names nothing", "Leave it at auto.")
    for word in ("auto", "all-linear"):
        if word in config.targets and len(config.targets) > 1:
            raise ConfigError(f"--adapter.targets {word} stands beside others", f"Use {word} alone, or drop it.")


def check_quantized(name: str, quantization: str) -> None:
    """Refuse adapters that cannot be put on quantized layers, or on plain ones.

    Raises:
        ConfigError: naming the reason and the remedy.
    """
    if quantization != "none" and (reason := NOT_QUANTIZED.get(name)):
        raise ConfigError(f"--quantization {quantization} with --adapter.name {name}: {reason}", ADAPT_OTHERWISE)
    if quantization == "none" and (reason := QUANTIZED.get(name)):
        raise ConfigError(f"--adapter.name {name} without --quantization: {reason}", QUANTIZE)


def add_adapter(model: Any, config: AdapterConfig, *, seed: int, low_bit: LowBit = PLAIN) -> Any:
    """`model` with an adapter in it: all else is frozen but what `config.train` names, and the head of a classifier.

    Args:
        model: of transformers, in fp32 on the CPU, not yet laid over the ranks; it is changed.
        config: `none` changes nothing.
        seed: from which the adapter is drawn, alike on all ranks.
        low_bit: in how many bits what is frozen is held.

    Raises:
        ConfigError: a setting that cannot take effect, or names that nothing in the model has.
    """
    check_adapter(config)
    check_quantized(config.name, low_bit.name)
    if config.name == "none":
        return model
    _refuse_in_vain(model, config)
    whole = _whole(model, config)
    layers = [] if config.name in PROMPTS else _layers(model, config, whole)
    origin = origin_of(model)
    base, revision = (origin.name, origin.revision) if origin else ("", None)
    digest = fingerprint(model, whole)  # of the plain weights, which an adapter can be put on again
    adapter = Adapter(config, seed, base, revision, digest, tuple(layers), tuple(whole), low_bit.name)
    beginning = _corrections(model, adapter, low_bit.device)
    quantize(model, low_bit, keep=whole)
    return _add(model, adapter, beginning)


def adapter_of(model: Any) -> Adapter | None:
    """What `add_adapter` put into a model, which may have been laid over the ranks since."""
    return getattr(model, "toolkit_adapter", None)


def left_out(model: Any) -> frozenset[str]:
    """Names of the weights that a checkpoint need not hold, because the base has them: the frozen ones.

    Those that the adapter changed when it was added (PiSSA takes a part out of them) a checkpoint holds.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return frozenset()
    changed = {f"{layer}.base_layer.weight" for layer in adapter.layers if adapter.config.name == "pissa"}
    named = model.named_parameters(remove_duplicate=False)  # a tied weight has two names
    return frozenset(n for n, p in named if not p.requires_grad and n not in changed)


def begins_at_zero(name: str) -> bool:
    """Whether the gradient of the parameter of this name is zero at first: B is, so A's is."""
    return ".lora_A." in name


def fingerprint(model: nn.Module, whole: Sequence[str]) -> str:
    """SHA-256 of the names, types, shapes and content of a plain model's weights, but for those of some modules."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not _inside(name, whole):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """What `Adapter.write` wrote.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return validate(Adapter, json.loads((folder / FILE).read_text(encoding="utf-8")), str(folder / FILE))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / FILE} cannot be read: {error}", "Copy the folder again.") from error


def load_base(folder: Path) -> Any:
    """The model that an adapter is for: that of `folder/config.json`, plain, in fp32, with the base's weights.

    Raises:
        ModelError: it is not there, or is another one than the adapter was trained on.
        CheckpointError: the folder is damaged.
    """
    adapter = read_adapter(folder)
    if not adapter.base:
        raise ModelError("the adapter's base was made in memory", "Save it, and train from its folder.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = load_again(ModelConfig(name=adapter.base, revision=adapter.revision), config)
    if fingerprint(model, adapter.whole) != adapter.fingerprint:
        raise ModelError(
            f"{adapter.base} is not the model that the adapter in {folder} was trained on: its weights are others",
            "Bring back the model that the run started from, under the same name.",
        )
    return model


def rebuild(folder: Path) -> Any:
    """Base and adapter as the run began with them; see `load_base`."""
    model, adapter = load_base(folder), read_adapter(folder)
    return _add(model, adapter, _corrections(model, adapter))


def save_adapter(model: Any, folder: Path) -> None:
    """Write an adapter, and what is trained whole, as plain PEFT loads it on top of the base.

    Args:
        model: plain, from `rebuild`, with the trained weights.
        folder: is there, with the model's config.json.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    state = adapter_state(model)
    config = copy.deepcopy(model.peft_config["default"])
    if adapter.config.name in ("pissa", "loftq"):
        state = _beside_the_whole_weights(model, load_base(folder), state, config)
    config.base_model_name_or_path, config.revision, config.inference_mode = adapter.base, adapter.revision, True
    for key in ("target_modules", "feedforward_modules"):
        if hasattr(config, key):  # sets, which would be written in another order each time
            setattr(config, key, sorted(getattr(config, key)))
    config.save_pretrained(folder)
    # Virtual tokens have no layers, nor PEFT's model around them, for their names to come from.
    inside = "" if adapter.config.name in PROMPTS else "base_model.model."
    tensors = {f"{inside}{name}": tensor.clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """What is trained of a model with an adapter, by the names that PEFT's files have for it; not copied."""
    adapter = adapter_of(model)
    if adapter and adapter.config.name in PROMPTS:
        return prompt_state(model, adapter.whole)
    with _quiet():
        state: dict[str, torch.Tensor] = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in state.items()}


def load_adapted(folder: Path, *, quantized: bool = False) -> Any:
    """PEFT's model of a saved adapter on its base, in fp32 on the CPU, in evaluation mode.

    Args:
        folder: of the adapter.
        quantized: round the base's weights to those that it was trained on, where these were quantized.

    Raises:
        ModelError: the base is not there or is another one, or the adapter cannot be loaded.
        CheckpointError: the folder is damaged.
    """
    model = load_base(folder)
    adapter = read_adapter(folder)
    if quantized and adapter.quantization != "none":
        round_weights(model, adapter.quantization, keep=adapter.whole)
    peft = import_peft()
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            adapted = peft.PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # each of the libraries below has its own
        raise ModelError(f"the adapter in {folder} cannot be loaded: {error}", "Copy it again.") from error
    state = {name: tuple(tensor.shape) for name, tensor in adapter_state(adapted).items()}
    if wrong := sorted(state.items() ^ there.items()):
        raise ModelError(f"the adapter in {folder} does not fit: {wrong[0][0]}", "Copy it again, or train again.")
    if quantized and adapter.config.name == "loftq":
        _keep_corrections(adapted)
    return adapted.eval()


def check_mergeable(folder: Path) -> None:
    """Refuse to merge an adapter that cannot become part of the weights.

    Raises:
        ConfigError: with the reason.
    """
    if (name := read_adapter(folder).config.name) in PROMPTS:
        raise ConfigError(
            f"{folder} is an adapter of kind {name}: virtual tokens stand in front of a text, and cannot be merged",
            "Use it on its base, as it is (`toolkit predict`, or PEFT).",
        )


def in_place(adapted: Any) -> Any:
    """The model in which the adapter is, of PEFT's model around it, which is not to be used any more."""
    model, config = adapted.get_base_model(), adapted.peft_config["default"]
    if config.is_prompt_learning:
        add_virtual_tokens(model, config, adapted.prompt_encoder["default"])
    return model


def import_peft() -> Any:
    """PEFT, without what it and the libraries that it tries print."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import peft

    return peft


def _add(model: Any, adapter: Adapter, beginning: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    peft = import_peft()
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter.seed)
        if adapter.config.name in PROMPTS:
            model.requires_grad_(False)
            add_virtual_tokens(model, prompt_config(peft, model, adapter.config, list(adapter.whole)))
            for name in adapter.whole:
                model.get_submodule(name).requires_grad_(True)
        else:
            peft.inject_adapter_in_model(_peft_config(peft, model, adapter), model)
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    tuned = {name for name, module in model.named_modules() if isinstance(module, layer)}
    if others := sorted(tuned ^ set(adapter.layers)):
        raise ConfigError(
            f"PEFT adapts other layers of this model than it was asked to: {', '.join(others[:3])}",
            "Name them with --adapter.targets.",
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if not parameter.is_contiguous():  # PiSSA's need not be
            parameter.data = parameter.data.contiguous()
    _begin(model, beginning)
    model.toolkit_adapter = adapter
    return model


def _refuse_in_vain(model: nn.Module, config: AdapterConfig) -> None:
    if getattr(model, "freezes", ()):
        raise ConfigError(
            f"--model.freeze has no effect with --adapter.name {config.name}, which freezes the network anyway",
            "Drop it; --adapter.targets and --adapter.train say what is trained.",
        )
    origin = origin_of(model)
    if origin and origin.init == "random":
        raise ConfigError(
            f"--adapter.name {config.name} would freeze random weights, as those of --model.init random are",
            "Begin with trained ones (--model.init pretrained, --model.name), or train all (--adapter.name none).",
        )


def _whole(model: Any, config: AdapterConfig) -> list[str]:
    """Names of the modules to be trained whole, none inside of another."""
    origin = origin_of(model)
    body = getattr(model, model.base_model_prefix, None)
    head = [] if body is None else [name for name, child in model.named_children() if _is_head(model, child, body)]
    chosen = {*head, *(_owner(name) for name in (origin.drawn if origin else ()))}
    parameters = [name for name, _ in model.named_parameters()]
    for pattern in config.train:
        owners = {_owner(name) for name in _matching("train", pattern, parameters, "parameter")}
        if "" in owners:
            raise ConfigError(f"--adapter.train {pattern!r} names a parameter of the model itself", "Name others.")
        chosen |= owners
    return [name for name, _ in model.named_modules() if name in chosen and not _inside(_owner(name), chosen)]


def _is_head(model: Any, child: nn.Module, body: nn.Module) -> bool:
    """Beside the body of the network; a language model's output layer has been trained with it."""
    return child not in (body, model.get_output_embeddings()) and any(True for _ in child.parameters())


def _layers(model: Any, config: AdapterConfig, whole: Sequence[str]) -> list[str]:
    """Names of the linear layers to be adapted."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not _inside(name, whole)
        and module is not model.get_output_embeddings()
    }
    table = _table(config.name).get(model.config.model_type) if config.targets == ("auto",) else None
    if table:
        layers = [name for name in linear if _in_table(name, table)]
        if not layers:
            raise ConfigError("--adapter.targets auto: this model has none of PEFT's layers", "Use all-linear.")
    elif config.targets[0] in ("auto", "all-linear"):
        layers = list(linear)
    else:
        found = [set(_matching("targets", pattern, linear, "linear layer")) for pattern in config.targets]
        layers = [name for name in linear if any(name in names for names in found)]
    rank = config.rank or RANK
    if config.name in ("pissa", "loftq") and (low := [n for n in layers if min(linear[n].weight.shape) < rank]):
        raise ConfigError(f"--adapter.rank {rank}: {low[0]} has no so many singular values", "Set it lower.")
    return layers


def _matching(key: str, pattern: str, names: Iterable[str], what: str) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(f"--adapter.{key} {pattern!r} is not a regular expression: {error}") from error
    if not found:
        parts = sorted({re.sub(r"^.*\d+\.", "", name) for name in names})
        hint = nearest(pattern, [*parts, *{name.rpartition(".")[2] for name in parts}])
        raise ConfigError(
            f"--adapter.{key} {pattern!r} matches no {what}.{hint}", f"There are: {', '.join(parts[:12])}, …"
        )
    return found


def _table(name: str) -> dict[str, Any]:
    utils: Any = import_peft().utils
    kind = "IA3" if name == "ia3" else "LORA"
    table: dict[str, Any] = getattr(utils, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING")
    return table


def _in_table(name: str, table: Sequence[str] | str) -> bool:
    if isinstance(table, str):
        return re.fullmatch(table, name) is not None
    return any(f".{name}".endswith(f".{entry}") for entry in table)


def _peft_config(peft: Any, model: Any, adapter: Adapter) -> Any:
    config = adapter.config
    common: dict[str, Any] = {"target_modules": list(adapter.layers), "modules_to_save": list(adapter.whole) or None}
    if config.name == "ia3":
        # Of these, which are few, the inputs are scaled and not the outputs.
        table = peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
        inner = [name for name in adapter.layers if _in_table(name, table)]
        return peft.IA3Config(feedforward_modules=inner, **common)
    rank = config.rank or RANK
    return peft.LoraConfig(
        r=rank,
        lora_alpha=config.alpha or 2 * rank,
        lora_dropout=config.dropout or 0.0,
        use_rslora=config.name == "rslora",
        use_dora=config.name == "dora",
        init_lora_weights="pissa" if config.name == "pissa" else True,
        **common,
    )


@torch.no_grad()
def _corrections(
    model: nn.Module, adapter: Adapter, device: torch.device = PLAIN.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoftQ's A and B of each layer (Li et al. 2023, algorithm 1, with one iteration, as PEFT has it for a base that is
    quantized already): their product is the nearest of its rank to what rounding takes from the weight."""
    if adapter.config.name != "loftq":
        return {}
    rank = adapter.config.rank or RANK
    scale = (adapter.config.alpha or 2 * rank) / rank
    errors = rounding_errors(model, adapter.quantization, keep=adapter.whole)
    chosen = ((name, error) for name, error in errors if name in adapter.layers)
    found = {name: _factors(error.to(device) / scale, rank) for name, error in chosen}
    if not found:
        raise ConfigError(f"--adapter.name loftq: {QUANTIZED['loftq']} of what --adapter.targets names", QUANTIZE)
    return found


@torch.no_grad()
def _begin(model: nn.Module, beginning: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """With these A and B. A plain base has lost nothing for them to bring back: it is left without what they add."""
    for name, (a, b) in beginning.items():
        layer: Any = model.get_submodule(name)
        for factor, value in ((layer.lora_A.default, a), (layer.lora_B.default, b)):
            factor.weight.copy_(value)
        if not is_quantized(layer.base_layer):
            layer.base_layer.weight -= layer.get_delta_weight("default")


def _keep_corrections(adapted: nn.Module) -> None:
    """On the rounded base, leave out the half of each saved product that takes back what LoftQ began with."""
    for module in adapted.modules():
        if lora_b := getattr(module, "lora_B", None):
            weight = lora_b.default.weight.data
            weight[:, weight.shape[1] // 2 :] = 0


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and B (outputs, rank), of equal norms, whose product B A is the nearest to a matrix."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


@torch.no_grad()
def _beside_the_whole_weights(model: Any, base: Any, state: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """PiSSA's adapter, or LoftQ's, as a LoRA of twice the rank, for the base as it is and not without what was taken.

    What was taken out of a weight has the adapter's rank: it is found again by its singular values, and subtracted.
    """
    config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, 2 * config.lora_alpha
    scale, weights = config.lora_alpha / config.r, dict(base.named_parameters())
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" not in state:
            continue
        taken = (weights[f"{name}.weight"] - module.base_layer.weight).double() / scale
        more_a, more_b = _factors(taken.T if module.fan_in_fan_out else taken, config.r // 2)
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        state[f"{name}.lora_A.weight"] = torch.cat([a, more_a.to(a.dtype)])
        state[f"{name}.lora_B.weight"] = torch.cat([b, -more_b.to(b.dtype)], dim=1)
    return state


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings, of what it then does rightly by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
