"""The command `toolkit gguf`: a language model becomes one file for llama.cpp and its kin, proved to answer alike."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from toolkit.adapters import FILE, check_mergeable
from toolkit.checkpoint.export import answer, probe_batch, quiet_libraries
from toolkit.checkpoint.screen import bar_of_bytes, human_size
from toolkit.errors import CheckpointError, ConfigError, ModelError
from toolkit.folders import file_written_aside
from toolkit.gguf.architectures import ARCHITECTURES, architecture_of
from toolkit.gguf.vocabulary import vocabulary_of
from toolkit.gguf.writing import BOUNDS, Proof, Written, prove, size_of, write
from toolkit.predict.kinds import WRITER
from toolkit.predict.loading import load_saved
from toolkit.predict.saved import find_model, first_line
from toolkit.report import Console
from toolkit.requirements import check_versions


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    bounds = ", ".join(f"{bound:g} for {name}" for name, bound in BOUNDS.items())
    parser.description = (
        f"{parser.description}: {', '.join(ARCHITECTURES)}, with a byte-level BPE tokenizer. The file is read again by "
        f"transformers, and refused where a token is another one, or a logit differs by more than {bounds}, of the "
        "largest logit"
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="folder of a run, or of a model, as `toolkit merge` makes"
    )
    parser.add_argument("target", metavar="FILE.gguf", type=Path, help="new file")
    parser.add_argument(
        "--dtype",
        choices=tuple(BOUNDS),
        default="f16",
        help="type of the weights, with 32, 16, 16 or 8.5 bits each; vectors stay f32 (default: f16)",
    )
    parser.add_argument("--name", help="of the model, which programs show (default: the name of the folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.gguf where it is there")


def run(arguments: Namespace) -> int:
    """`toolkit gguf`: from the cheapest check to the dearest.

    Raises:
        ToolkitError: a mistake of the user, or a model that would not answer alike.
    """
    run, target = arguments.run.expanduser(), arguments.target.expanduser()
    _check_target(target, overwrite=arguments.overwrite)
    saved = find_model(run)
    if saved.kind is not WRITER:
        raise ModelError(f"{saved.folder} holds {saved.kind.about}", "Name a run that trained a language model.")
    if (saved.folder / FILE).is_file():
        check_mergeable(saved.folder)
        raise ModelError(
            f"{saved.folder} is an adapter, which is no model without its base",
            f"Merge them first, with `toolkit merge {run}`, and name the folder that it makes: {run / 'merged'}.",
        )
    check_versions()
    _check_architecture(saved.folder)
    if saved.status not in ("", "finished"):
        Console(out=sys.stderr).warn(f"the run ended early ({saved.status}): this is the model as it was then")
    written, proof = convert(saved.folder, target, arguments.dtype, arguments.name or run.resolve().name)
    types = ", ".join(f"{number} in {kind}" for kind, number in written.types.items())
    print(target)
    size = human_size(target.stat().st_size)
    print(
        f"{written.parameters:,} parameters in {written.tensors} tensors ({types}), {size}; read again by "
        f"transformers, its tokens are the same, and its logits differ by at most {proof.difference:.3g} "
        f"(bound {proof.bound:.3g})",
        file=sys.stderr,
    )
    return 0


def convert(folder: Path, target: Path, dtype: str, name: str) -> tuple[Written, Proof]:
    """Write the file of a model; it takes its place when it is proved.

    Args:
        folder: of a whole model.
        target: written to by this process alone.
        dtype: of the weights: `f32`, `f16`, `bf16` or `q8_0`.
        name: of the model, for those who look into the file.

    Raises:
        ModelError: it cannot be loaded, or GGUF has no place for it.
        CheckpointError: the file cannot be written, or would not answer alike.
    """
    with quiet_libraries():
        model, tokenizer = load_saved(folder, AutoModelForCausalLM)
        probe = probe_batch(model.config)
        expected = answer(model.eval(), probe)
    vocabulary = vocabulary_of(tokenizer, _rows(model), model.generation_config.eos_token_id)
    with file_written_aside(target) as path:
        with bar_of_bytes("writing", size_of(model, dtype)) as advance:
            written = write(path, model, vocabulary, name, dtype, advance)
        return written, prove(path, model, tokenizer, expected, probe, dtype)


def _check_architecture(folder: Path) -> None:
    """Before the weights are loaded."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has several, for a type that it does not know and for odd values
        raise ModelError(
            f"{folder}/config.json cannot be understood: {first_line(error)}", "Copy the model again, or train again."
        ) from error
    architecture_of(config)


def _rows(model: Any) -> int:
    table: torch.nn.Embedding = model.get_input_embeddings()
    return table.num_embeddings


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.suffix != ".gguf":
        raise ConfigError(f"{target} has no name that ends in .gguf, by which programs know such files", "Name one.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: there is no folder {target.parent}", "Make it first.")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder", "Name a new file.")
    if os.path.lexists(target) and not overwrite:
        raise CheckpointError(f"{target} is there already", "Name a new file, or replace it with --overwrite.")
