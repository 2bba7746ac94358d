"""The command `toolkit merge`: an adapter becomes part of its base, and the result is proved to answer alike."""

from __future__ import annotations

import copy
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from toolkit.adapters import FILE, check_mergeable, load_adapted, read_adapter
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
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of an adapter that a run has saved")
    parser.add_argument("--out", metavar="DIR", type=Path, help="new folder of the model (default: RUN/merged)")
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
    source = arguments.run.expanduser()
    folder = find_model(source).folder
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} is a whole model, with no adapter to merge", "Use it as it is.")
    check_mergeable(folder)
    target = arguments.out.expanduser() if arguments.out else source / "merged"
    refuse_taken(target)
    check_versions()
    quantized = arguments.base == "quantized"
    if quantized and read_adapter(folder).quantization == "none":
        raise ConfigError(f"--base quantized has no effect: the base of {folder} was not quantized", "Drop it.")
    found = merge(folder, target, arguments.dtype, quantized=quantized)
    print(target)
    for difference in found:
        print(
            f"loaded again, its logits differ from those of the adapter on {difference.base} by at most "
            f"{difference.largest:.3g} (bound {difference.bound:.3g})",
            file=sys.stderr,
        )
    return 0


@dataclass(frozen=True)
class Difference:
    """How far the answers of the merged model are from those of the adapter.

    Attributes:
        base: which the adapter was on, in words.
        largest: difference of a logit.
        bound: on it.
    """

    base: str
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
        weights = {
            name: tensor.to(_DTYPES[dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in merged.state_dict().items()
        }
        probe = probe_batch(merged.config)
        size = max(1.0, float(answer(apart, probe).abs().max()))
        with written_aside(target) as aside:
            write_files(merged, weights, tokenizer, aside, "5GB")
            again = load_written(aside, merged)
            rounded = f"its base in {quantization}"
            base = rounded if quantized else "its base"
            found = [Difference(base, logit_difference(apart, again, probe), BOUNDS[dtype] * size)]
            if quantization != "none" and not quantized:
                trained = load_adapted(folder, quantized=True).get_base_model()
                bound = QUANTIZED_BOUNDS[quantization] * size
                found.append(Difference(rounded, logit_difference(trained, again, probe), bound))
            for difference in found:
                _refuse_above(difference, dtype)
    return found


def _refuse_above(difference: Difference, dtype: str) -> None:
    if not difference.largest <= difference.bound:  # a difference that is not a number is no small one
        raise CheckpointError(
            f"merged in {dtype}, the model answers otherwise: its logits differ from those of the adapter on "
            f"{difference.base} by up to {difference.largest:.3g}, and the bound is {difference.bound:.3g}",
            "Nothing was kept of it. Merge in fp32, or use the adapter on its base; what was trained on a quantized "
            "one answers alike when it is merged into that (--base quantized).",
        )
