"""A model in the Hugging Face layout, and the proof that what was written is what was trained."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from toolkit.adapters import adapter_of
from toolkit.checkpoint.joined import load_weights, state_digest
from toolkit.data.images import FILE as IMAGE_PROCESSOR
from toolkit.data.images import load_processor
from toolkit.data.tables import Catalogue, Preprocessor
from toolkit.data.tables.events import FILE as ITEMS
from toolkit.data.tables.preprocess import FILE as TABLE
from toolkit.errors import CheckpointError, ModelError
from toolkit.folders import Guard, unguarded, written_aside
from toolkit.networks import architecture
from toolkit.networks.tables import TableConfig
from toolkit.strategies.deepspeed_library import quiet

__all__ = [
    "BOUND",
    "Proof",
    "build_model",
    "export_model",
    "load_tokenizer",
    "load_weights",
    "probe_batch",
    "prove",
    "state_digest",
    "write_base",
    "write_model",
]

BOUND = 1e-5
"""Largest difference of two answers of the same fp32 weights. They differ at all only where kernels do."""

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_PROBE_LENGTHS = (12, 7)


@dataclass(frozen=True)
class Proof:
    """What was found when an exported model was loaded again.

    Attributes:
        tensors, parameters: in its files: how many, and their elements.
        files, bytes: of the weights.
        weight_difference: largest absolute difference of a weight or buffer.
        logit_difference: largest absolute difference of the answers to the probe.
        bound: that neither may exceed.
    """

    tensors: int
    parameters: int
    files: int
    bytes: int
    weight_difference: float
    logit_difference: float
    bound: float


def write_base(model: PreTrainedModel, tokenizer: Any, base: Path, guard: Guard = unguarded) -> None:
    """Write what `build_model` and `load_tokenizer` read beside the weights of a checkpoint.

    Args:
        model: plain, in fp32, as the run begins with it.
        tokenizer: saved beside the configuration; None where there is none.
        base: where to.
        guard: as for `written_aside`.
    """
    with written_aside(base, guard) as aside, quiet_libraries():
        write_config(model, aside, torch.float32)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if adapter := adapter_of(model):
            adapter.write(aside)


def write_model(
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    tokenizer: Any,
    target: Path,
    max_shard_size: str,
    guard: Guard = unguarded,
) -> None:
    """Write a model folder, which takes the place of `target` when it is whole.

    Args:
        model: says how its weights are called and what its configuration is; its own weights are not read.
        weights: whole, by the plain model's names, in the memory of the CPU.
        tokenizer: saved beside the model; None where there is none.
        target: where to.
        max_shard_size: of a file of weights, as `5GB`.
        guard: as for `written_aside`.
    """
    with written_aside(target, guard) as aside, quiet_libraries():
        write_files(model, weights, tokenizer, aside, max_shard_size)


def export_model(
    base: Path, weights: Mapping[str, torch.Tensor], target: Path, max_shard_size: str, bound: float = BOUND
) -> Proof:
    """Write and prove a model folder; it takes the place of `target` when it is proved.

    Args:
        base: holds the run's configuration of the model, and its tokenizer.
        weights: whole, by the plain model's names.
        target: written to by this process alone.
        max_shard_size: of a file of weights, as `5GB`.
        bound: on the differences of weights and logits.

    Raises:
        ModelError: `base` describes no model that transformers can build, or no tokenizer.
        CheckpointError: the weights are not those of the model, or the proof failed.
    """
    with quiet_libraries():
        tokenizer = load_tokenizer(base)
        model = build_model(base, weights)
        with written_aside(target) as aside:
            write_files(model, weights, tokenizer, aside, max_shard_size)
            return prove(aside, model, probe_batch(model.config), bound)


def prove(target: Path, model: PreTrainedModel, probe: Mapping[str, torch.Tensor], bound: float = BOUND) -> Proof:
    """Load a written model again and compare it with the one that it was made from. Removes it where that fails.

    Args:
        target: folder of the model.
        model: plain, in fp32, with the right weights.
        probe: a batch that it can answer, on its device.
        bound: on the differences of weights and logits.

    Raises:
        CheckpointError: it cannot be loaded, lacks weights, has wrong names, or differs by more than the bound.
    """
    try:
        tensors, parameters = _check_files(target)
        with quiet_libraries():
            again = load_written(target, model)
        weights = _weight_difference(model, again)
        logits = logit_difference(model, again, probe)
        # A difference that is not a number is no small one.
        if not (weights <= bound and logits <= bound):
            raise CheckpointError(
                f"the exported model is not the one that was trained: its weights differ by up to {weights:.3g}, its "
                f"logits by up to {logits:.3g}, and the bound is {bound:g}",
                "Nothing was kept of it. Where other kernels explain so small a difference, set a higher bound.",
            )
    except CheckpointError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    sizes = [path.stat().st_size for path in target.glob("*.safetensors")]
    return Proof(tensors, parameters, len(sizes), sum(sizes), weights, logits, bound)


def build_model(base: Path, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model that `base/config.json` describes, in fp32 on the CPU, with these weights. Runs no code from there.

    Raises:
        ModelError: transformers has no such model.
        CheckpointError: the weights are not those of this model.
    """
    config, kind = _architecture(base)
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float32)
    own = model.state_dict()
    strange = [name for name in weights if name not in own or weights[name].shape != own[name].shape]
    given = {own[name].data_ptr() for name in weights if name in own}
    # What is tied to a tensor that is given needs none of its own.
    lacking = [name for name in own if name not in weights and own[name].data_ptr() not in given]
    if strange or lacking:
        raise CheckpointError(
            f"the weights are not those of the {kind.__name__} in {base}: {len(strange)} do not fit "
            f"({', '.join(strange[:3]) or 'none'}), {len(lacking)} are missing ({', '.join(lacking[:3]) or 'none'})",
            "Take base/ and checkpoint from the same run.",
        )
    model.load_state_dict(dict(weights), strict=False)
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base, **_LOCAL)
    return model.eval()


def load_tokenizer(base: Path) -> Any:
    """The tokenizer in `base`, from its files alone, or what else prepares the inputs of its model.

    Raises:
        ModelError: there is none.
    """
    try:
        with quiet_libraries():
            if (base / TABLE).is_file():
                return Preprocessor.from_pretrained(base)
            if (base / ITEMS).is_file():
                return Catalogue.from_pretrained(base)
            if (base / IMAGE_PROCESSOR).is_file() and not (base / "tokenizer_config.json").is_file():
                return load_processor(base)
            if (base / "processor_config.json").is_file():  # which holds one, and what makes features of recordings
                return AutoProcessor.from_pretrained(base, **_LOCAL)
            tokenizer = AutoTokenizer.from_pretrained(base, **_LOCAL)
    except Exception as error:  # each of the libraries below has its own
        raise _unreadable(base, "tokenizer", error) from error
    # Where its files are missing, transformers makes one that knows no word, in silence.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 2:
        raise _unreadable(base, "tokenizer", FileNotFoundError("its vocabulary is missing"))
    tokenizer.init_kwargs.pop("local_files_only", None)  # or it is saved with the tokenizer
    return tokenizer


def probe_batch(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A small batch, always the same, that a model of this configuration answers: (2, 12) tokens and a mask, images,
    sound or rows of a table.

    Raises:
        CheckpointError: the model reads none of these.
    """
    if isinstance(config, TableConfig):
        generator = torch.Generator().manual_seed(0)
        columns = [torch.randint(size, (8,), generator=generator) for size in config.category_sizes]
        categories = torch.stack(columns, 1) if columns else torch.empty(8, 0, dtype=torch.long)
        return {"numbers": torch.randn(8, config.numbers, generator=generator), "categories": categories}
    text = config.get_text_config()
    if not getattr(text, "vocab_size", None) and (channels := getattr(config, "num_channels", None)):
        side = getattr(config, "image_size", 32)
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        return {"pixel_values": torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))}
    if not getattr(text, "vocab_size", None):
        raise CheckpointError(f"a {config.model_type} reads no tokens: it cannot be proved on a batch of them", "")
    pad, end = getattr(text, "pad_token_id", None), _first(getattr(text, "eos_token_id", None))
    special = {pad, end, _first(getattr(text, "bos_token_id", None))}
    ordinary = torch.tensor([token for token in range(min(text.vocab_size, 50_000)) if token not in special])
    longest = max(1, min(_PROBE_LENGTHS[0], (getattr(text, "max_position_embeddings", None) or 512) - 2))
    # Some classifiers take several texts only where they know a token that pads.
    lengths = [longest] if pad is None else [longest, min(longest, _PROBE_LENGTHS[1])]
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((len(lengths), longest), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = ordinary[torch.randint(len(ordinary), (length,), generator=generator)]
        mask[row, :length] = 1
        if end is not None and end < text.vocab_size:
            ids[row, length - 1] = end  # by which some find the end of a text
    if mels := getattr(config, "num_mel_bins", None):  # a model of speech, which reads a window of features
        frames = 2 * config.max_source_positions
        features = torch.randn(len(ids), mels, frames, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    probe = {"input_ids": ids, "attention_mask": mask}
    return probe | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def write_files(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], tokenizer: Any, folder: Path, max_shard_size: str
) -> None:
    """Write the files of a model folder into one that is there; see `write_model`."""
    # Of two names for one tensor the file holds one; copies of them cannot be told from two tensors.
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if name in weights and source in weights and torch.equal(weights[name], weights[source])
    }
    kept = {name: tensor for name, tensor in weights.items() if name not in tied}
    model.save_pretrained(folder, state_dict=kept, max_shard_size=max_shard_size)
    # Once more: transformers has noted the type of the engine's copies, in which it would load these weights.
    write_config(model, folder, next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json: of the plain model, whatever wraps it, with weights of `dtype`."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = dtype
    config.save_pretrained(folder)


def _check_files(target: Path) -> tuple[int, int]:
    """Numbers of tensors and of their elements in the files, whose names and shapes must be right."""
    tensors = parameters = 0
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                if not math.prod(shape):
                    raise CheckpointError(f"{name} was written without an element: {shape}", _DEFECT)
                parts = name.split(".")
                if parts[0] == "module" or any(part in _WRAPPERS or part.startswith("_fsdp") for part in parts):
                    raise CheckpointError(f"{name} is the name of a wrapper, not of the model", _DEFECT)
                tensors += 1
                parameters += math.prod(shape)
    if not tensors:
        raise CheckpointError(f"{target} has no weights", _DEFECT)
    return tensors, parameters


def load_written(target: Path, model: PreTrainedModel) -> PreTrainedModel:
    """A written model of the same class as `model`, in fp32, if it has all weights and no others."""
    try:
        again, report = type(model).from_pretrained(
            target,
            dtype=torch.float32,
            attn_implementation=model.config._attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except Exception as error:  # whatever it is, the export is of no use
        raise CheckpointError(f"the exported model cannot be loaded: {_line(error)}", _DEFECT) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(map(str, report[problem]))
            raise CheckpointError(
                f"the exported model has {len(names)} {problem.replace('_', ' ')}: {', '.join(names[:3])}", _DEFECT
            )
    loaded: PreTrainedModel = again.to(model.device)
    return loaded


def _weight_difference(model: PreTrainedModel, again: PreTrainedModel) -> float:
    there, here = again.state_dict(), model.state_dict()
    if there.keys() != here.keys():
        raise CheckpointError(f"names differ: {', '.join(sorted(there.keys() ^ here.keys())[:3])}", _DEFECT)
    differences = [_difference(tensor, there[name]) for name, tensor in here.items()]
    return float(torch.tensor(differences, dtype=torch.float64).max())  # Python's max would lose what is not a number


def logit_difference(model: PreTrainedModel, again: PreTrainedModel, probe: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute difference of two models' answers to `probe`."""
    training = model.training
    try:
        return _difference(answer(model.eval(), probe), answer(again.eval(), probe))
    finally:
        model.train(training)


@torch.no_grad()
def answer(model: PreTrainedModel, probe: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A model's logits on `probe`, or the first of its outputs."""
    outputs: Any = model(**probe)
    logits: torch.Tensor = outputs.logits if "logits" in outputs else outputs[0]
    if logits.ndim == 3 and "input_ids" in probe:  # of PEFT's model around one, virtual tokens have some too, in front
        logits = logits[:, -probe["input_ids"].shape[1] :]
    return logits.float()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    if torch.equal(one, other):
        return 0.0
    # Two infinities are equal, and yet have no difference.
    return float((one.double() - other.double()).abs().masked_fill_(one == other, 0).max())


def _architecture(base: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    try:
        name = (json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0]
        config = AutoConfig.from_pretrained(base, **_LOCAL)
    except Exception as error:  # each of the libraries below has its own
        raise _unreadable(base, "model", error) from error
    kind = architecture(str(name))
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ModelError(
            f"{base}/config.json names the architecture {name!r}, which is no model of transformers or of this toolkit",
            "A model with code of its own cannot be exported by this command.",
        )
    return config, kind


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the bars and reports of transformers, and what DeepSpeed prints when transformers imports it to save."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _unreadable(base: Path, what: str, error: Exception) -> ModelError:
    return ModelError(
        f"no {what} could be loaded from {base}: {_line(error)}",
        "The run writes config.json and its tokenizer there when it starts: take the folder from the run or a backup.",
    )


def _first(token: Any) -> Any:
    """Some configurations name several tokens that end a text."""
    return token[0] if isinstance(token, (list, tuple)) else token


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


_DEFECT = "Nothing was kept of it. This is a defect of the toolkit, or of the model's class in transformers: report it."
