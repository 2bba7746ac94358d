"""The command `toolkit merge`: an adapter becomes part of its base, and the result is proved to answer alike."""

from __future__ import annotations

import copy
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from toolkit.adapters import FILE, load_adapted
from toolkit.checkpoint.export import (
    answer,
    load_tokenizer,
    load_written,
    logit_difference,
    probe_batch,
    quiet_libraries,
    write_files,
)
from toolkit.errors import CheckpointError
from toolkit.folders import refuse_taken, written_aside
from toolkit.predict.saved import find_model
from toolkit.requirements import check_versions

BOUNDS = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of a logit, relative to the largest logit (or to 1): the products are added up in another order,
and weights of 16 bits are rounded."""
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    bounds = ", ".join(f"{bound:g} for {name}" for name, bound in BOUNDS.items())
    parser.description = (
        f"{parser.description}. Refused where a logit then differs by more than {bounds}, of the largest logit"
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of an adapter that a run has saved")
    parser.add_argument("--out", metavar="DIR", type=Path, help="new folder of the model (default: RUN/merged)")
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
    target = arguments.out.expanduser() if arguments.out else source / "merged"
    refuse_taken(target)
    check_versions()
    difference, bound = merge(folder, target, arguments.dtype)
    print(target)
    print(
        f"loaded again, its logits differ from those of the adapter on its base by at most {difference:.3g} "
        f"(bound {bound:.3g})",
        file=sys.stderr,
    )
    return 0


def merge(folder: Path, target: Path, dtype: str) -> tuple[float, float]:
    """Write the model of an adapter and its base, merged in fp32; it takes the place of `target` when it is proved.

    Args:
        folder: of the adapter.
        target: written to by this process alone.
        dtype: of the weights that are written: `fp32`, `fp16` or `bf16`.

    Returns:
        The largest difference between a logit of the adapter on its base and one of the model that was written, loaded
        again in fp32; and the bound on it.

    Raises:
        ModelError: the base is not there, or is another one than the adapter was trained on.
        CheckpointError: the difference is above the bound.
    """
    tokenizer = load_tokenizer(folder)
    with quiet_libraries():
        adapted = load_adapted(folder)
        apart = copy.deepcopy(adapted.get_base_model())
        merged = adapted.merge_and_unload(safe_merge=True)
        weights = {
            name: tensor.to(_DTYPES[dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in merged.state_dict().items()
        }
        probe = probe_batch(merged.config)
        bound = BOUNDS[dtype] * max(1.0, float(answer(apart, probe).abs().max()))
        with written_aside(target) as aside:
            write_files(merged, weights, tokenizer, aside, "5GB")
            difference = logit_difference(apart, load_written(aside, merged), probe)
            if not difference <= bound:  # a difference that is not a number is no small one
                raise CheckpointError(
                    f"merged in {dtype}, the model answers otherwise: its logits differ by up to {difference:.3g}, and "
                    f"the bound is {bound:.3g}",
                    "Nothing was kept of it. Merge in fp32, or use the adapter on its base.",
                )
    return difference, bound
