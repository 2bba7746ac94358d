"""The command `toolkit merge`: adapters become part of their base, and the result is proved to answer alike."""

from __future__ import annotations

import copy
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from toolkit.adapters import FILE, check_mergeable, load_adapted, load_base, read_adapter
from toolkit.checkpoint.export import (
    answer,
    load_tokenizer,
    load_written,
    logit_difference,
    probe_batch,
    quiet_libraries,
    write_files,
)
from toolkit.errors import CheckpointError, ConfigError
from toolkit.folders import refuse_taken, written_aside
from toolkit.predict.saved import find_model
from toolkit.requirements import check_versions

BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of a logit, relative to the largest logit (or to 1): the products are added up in another order,
and weights of 16 bits are rounded."""
QUANTIZED_BOUNDS = {"int8": 0.1, **dict.fromkeys(("nf4", "nf4-double", "fp4", "fp4-double"), 0.5)}
"""The same against the adapter on its quantized base, which it was trained on: the weights under it are now others. In
8 bits they were rounded to 1/254 of the largest of a row, in 4 bits to 15 or 16 values."""
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    bounds = ", ".join(f"{bound:g} for {name}" for name, bound in BOUNDS.items())
    parser.description = (
        f"{parser.description}. Refused where a logit then differs by more than {bounds}, of the largest logit"
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, nargs="+", help="folder of a run, or of an adapter that a run has saved"
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        type=float,
        nargs="+",
        help="of several RUNs: how much of what each has learnt is added to their base. 1 1 adds two up, 0.5 0.5 is "
        "their mean",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="new folder of the model (default: RUN/merged; of several: needed)"
    )
    parser.add_argument(
        "--base",
        choices=("plain", "quantized"),
        default="plain",
        help="where the adapter was trained on a quantized base: merge into the weights as they were loaded (default), "
        "or as they were rounded for that",
    )
    parser.add_argument("--dtype", choices=tuple(BOUNDS), default="fp32", help="type of the weights (default: fp32)")


def run(arguments: Namespace) -> int:
    """`toolkit merge`: from the cheapest check to the dearest.

    Raises:
        ToolkitError: a mistake of the user, or a model that would not answer alike.
    """
    folders = [find_model(source.expanduser()).folder for source in arguments.run]
    for folder in folders:
        if not (folder / FILE).is_file():
            raise CheckpointError(f"{folder} is a whole model, with no adapter to merge", "Use it as it is.")
        check_mergeable(folder)
    quantized = arguments.base == "quantized"
    if len(folders) > 1:
        _check_several(folders, arguments)
    elif arguments.weights is not None:
        raise ConfigError("--weights has no effect on one adapter, which is added whole", "Drop it.")
    target = arguments.out.expanduser() if arguments.out else arguments.run[0].expanduser() / "merged"
    refuse_taken(target)
    check_versions()
    if quantized and read_adapter(folders[0]).quantization == "none":
        raise ConfigError(f"--base quantized has no effect: the base of {folders[0]} was not quantized", "Drop it.")
    if len(folders) > 1:
        found = merge_several(folders, arguments.weights, target, arguments.dtype)
    else:
        found = merge(folders[0], target, arguments.dtype, quantized=quantized)
    print(target)
    for difference in found:
        print(
            f"loaded again, its logits differ from those of {difference.other} by at most "
            f"{difference.largest:.3g} (bound {difference.bound:.3g})",
            file=sys.stderr,
        )
    return 0


def _check_several(folders: Sequence[Path], arguments: Namespace) -> None:
    weights = arguments.weights
    if weights is None or len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"{len(folders)} adapters need --weights, a number for each of them",
            f"--weights {' '.join(['1'] * len(folders))} adds up what they have learnt, "
            f"{' '.join([f'{1 / len(folders):.3g}'] * len(folders))} is the mean of it.",
        )
    if arguments.out is None:
        raise ConfigError("several adapters need --out: their model belongs to none of the runs", "Name a new folder.")
    if arguments.base == "quantized":
        raise ConfigError("--base quantized is for one adapter", "Drop it: several are added to the plain base.")
    first, *others = map(read_adapter, folders)
    for folder, adapter in zip(folders[1:], others, strict=True):
        if (adapter.fingerprint, adapter.whole) != (first.fingerprint, first.whole):
            raise ConfigError(
                f"the adapters in {folders[0]} and {folder} were trained on other bases ({first.base}, "
                f"{adapter.base}), or with other modules beside them",
                "Merge adapters of one base; to train one upon another, merge the first and begin with that model.",
            )
    if not first.whole:
        return
    if not math.isclose(sum(weights), 1, rel_tol=1e-6):
        raise ConfigError(
            f"--weights come to {sum(weights):g}, and {', '.join(first.whole[:3])} were trained whole, of which there "
            "is a mean, but no sum",
            "Give weights that come to 1.",
        )
    labels = [AutoConfig.from_pretrained(folder, local_files_only=True).id2label for folder in folders]
    if any(other != labels[0] for other in labels):
        raise ConfigError("the adapters know other classes", "Merge those of one task.")


@dataclass(frozen=True)
class Difference:
    """How far the answers of the merged model are from those that they are to be.

    Attributes:
        other: what it was held against, in words.
        largest: difference of a logit.
        bound: on it.
    """

    other: str
    largest: float
    bound: float


def merge(folder: Path, target: Path, dtype: str, *, quantized: bool = False) -> list[Difference]:
    """Write the model of an adapter and its base, merged in fp32; it takes the place of `target` when it is proved.

    Args:
        folder: of the adapter.
        target: written to by this process alone.
        dtype: of the weights that are written: `fp32`, `fp16` or `bf16`.
        quantized: merge into the base's weights as they were rounded when the adapter was trained.

    Returns:
        What was found when the model was loaded again in fp32, and compared with the adapter on that base; and, where
        it was trained on a quantized one, but is merged into the plain one, with the adapter on the former too.

    Raises:
        ModelError: the base is not there, or is another one than the adapter was trained on.
        CheckpointError: a difference is above its bound.
    """
    tokenizer, quantization = load_tokenizer(folder), read_adapter(folder).quantization
    with quiet_libraries():
        adapted = load_adapted(folder, quantized=quantized)
        apart = copy.deepcopy(adapted.get_base_model())
        merged = adapted.merge_and_unload(safe_merge=True)
        probe = probe_batch(merged.config)
        size = max(1.0, float(answer(apart, probe).abs().max()))
        with written_aside(target) as aside:
            again = _written(merged, tokenizer, aside, dtype)
            rounded = f"its base in {quantization}"
            base = f"the adapter on {rounded if quantized else 'its base'}"
            found = [Difference(base, logit_difference(apart, again, probe), BOUNDS[dtype] * size)]
            if quantization != "none" and not quantized:
                trained = load_adapted(folder, quantized=True).get_base_model()
                bound = QUANTIZED_BOUNDS[quantization] * size
                found.append(Difference(f"the adapter on {rounded}", logit_difference(trained, again, probe), bound))
            for difference in found:
                _refuse_above(difference, dtype)
    return found


def merge_several(folders: Sequence[Path], weights: Sequence[float], target: Path, dtype: str) -> list[Difference]:
    """Write the model of several adapters on one base; it takes the place of `target` when it is proved.

    What each has learnt is the difference of its merged weights from the base's, of whatever kind it is, and the
    weighted sum of these is added (Ilharco et al. 2023: Editing Models with Task Arithmetic).

    Args:
        folders: of adapters on the same base.
        weights: of each.
        target: written to by this process alone.
        dtype: of the weights that are written: `fp32`, `fp16` or `bf16`.

    Returns:
        What was found when the model was loaded again in fp32, and compared with the sum.

    Raises:
        ModelError: the base is not there, or is another one than the adapters were trained on.
        CheckpointError: the difference is above its bound.
    """
    tokenizer = load_tokenizer(folders[0])
    with quiet_libraries(), torch.no_grad():
        merged = load_base(folders[0]).eval()
        total = dict(merged.named_parameters())
        start = {name: parameter.clone() for name, parameter in total.items()}
        for folder, weight in zip(folders, weights, strict=True):
            one = load_adapted(folder).merge_and_unload(safe_merge=True).state_dict()
            for name, parameter in total.items():
                parameter += weight * (one[name] - start[name])
        probe = probe_batch(merged.config)
        bound = BOUNDS[dtype] * max(1.0, float(answer(merged, probe).abs().max()))
        with written_aside(target) as aside:
            again = _written(merged, tokenizer, aside, dtype)
            difference = Difference("the sum of the adapters", logit_difference(merged, again, probe), bound)
            _refuse_above(difference, dtype)
    return [difference]


def _written(merged: Any, tokenizer: Any, folder: Path, dtype: str) -> Any:
    """Write a merged model, and load it again in fp32."""
    weights = {
        name: tensor.to(_DTYPES[dtype]) if tensor.is_floating_point() else tensor
        for name, tensor in merged.state_dict().items()
    }
    write_files(merged, weights, tokenizer, folder, "5GB")
    return load_written(folder, merged)


def _refuse_above(difference: Difference, dtype: str) -> None:
    if not difference.largest <= difference.bound:  # a difference that is not a number is no small one
        raise CheckpointError(
            f"merged in {dtype}, the model answers otherwise: its logits differ from those of "
            f"{difference.other} by up to {difference.largest:.3g}, and the bound is {difference.bound:.3g}",
            "Nothing was kept of it. Merge in fp32, or use the adapter on its base; what was trained on a quantized "
            "one answers alike when it is merged into that (--base quantized).",
        )
