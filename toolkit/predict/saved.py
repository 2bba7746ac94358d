"""The model that a run has left on the disk: found, and checked as far as it can be without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import CheckpointError, ModelError, nearest
from toolkit.predict.kinds import CLASSIFIER, KINDS, SCORER, Kind, kind_of
from toolkit.report import RunFolder

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
)


@dataclass(frozen=True)
class SavedModel:
    """A model on the disk that looks whole.

    Attributes:
        folder: holds config.json, safetensors and the tokenizer.
        max_length: tokens to which the run cut its texts; None where no run says so.
        kind: what it answers to, and how.
        status: how the run ended, as its report says; empty where it says nothing.
        data: settings of the run's data; empty where no run is known.
    """

    folder: Path
    max_length: int | None
    kind: Kind = CLASSIFIER
    status: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def normalise(self) -> tuple[Any, ...]:
        """What the run did to each text first."""
        return tuple(self.data.get("normalise") or ())


def find_model(run: Path) -> SavedModel:
    """The model of a run, or a model folder itself, checked as far as it can be without loading it.

    Raises:
        CheckpointError: there is no such folder, it is no run, or the run has no model.
        ModelError: what is there is neither a classifier nor a language model, or not whole.
    """
    run = run.expanduser()
    if not run.is_dir():
        beside = [entry.name for entry in run.parent.iterdir()] if run.parent.is_dir() else []
        what = "is a file, not a folder" if run.exists() else "is not there"
        raise CheckpointError(
            f"the run {run} {what}.{nearest(run.name, beside)}",
            f"Name the folder of a run, like runs/bert_cls/001. Relative names are looked for in {Path.cwd()}.",
        )
    if (run / "config.yaml").is_file():
        if not (run / "model" / "config.json").is_file():
            raise _no_model(run)
        return _of_run(run / "model", run)
    if (run / "config.json").is_file():
        parent = run.resolve().parent
        known = run.resolve().name == "model" and (parent / "config.yaml").is_file()
        return _of_run(run, parent) if known else SavedModel(run, None, _check_model(run, {}))
    runs = sorted(path.parent.name for path in run.glob("*/config.yaml"))
    raise CheckpointError(
        f"{run} is no run (it has no config.yaml) and no model (it has no config.json)",
        f"Name one of the runs in it: {', '.join(runs[-8:])}." if runs else "Name the folder of a run.",
    )


def _of_run(folder: Path, run: Path) -> SavedModel:
    data = _settings(run).get("data")
    data = data if isinstance(data, dict) else {}
    return SavedModel(folder, _max_length(run, data), _check_model(folder, data), _status(run), data)


def _no_model(run: Path) -> CheckpointError:
    checkpoint = _settings(run).get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("save_model") is False:
        return CheckpointError(
            f"the run {run} kept no model: its config.yaml says checkpoint.save_model: false",
            "Train it again with --checkpoint.save_model True.",
        )
    ended = {"failed": "it failed", "interrupted": "it was interrupted"}.get(_status(run), "it has not finished")
    return CheckpointError(
        f"the run {run} has no model: {ended}",
        "A run writes its model/ when it ends: wait for it, or train again.",
    )


def _check_model(folder: Path, data: Mapping[str, Any]) -> Kind:
    """The kind of the model in `folder`; ModelError where the files are no model that could be loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder}/config.json cannot be read: {first_line(error)}", "Copy the model again."
        ) from error
    architecture = str((architectures or [""])[0])
    kind = kind_of(architecture)
    if kind is None:
        found = f"a {architecture}" if architecture else "of no architecture that its config.json names"
        raise ModelError(
            f"the model in {folder} is {found}, which this command does not know",
            f"It knows {'; '.join(known.about for known in KINDS)}.",
        )
    if kind is CLASSIFIER and data.get("text_pair"):
        kind = replace(SCORER, reads="rows")
    elif kind is CLASSIFIER and config.get("problem_type") in ("regression", "multi_label_classification"):
        kind = SCORER
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no .safetensors file" + (f", only {pickled[0]}, which can run code" if pickled else ""),
            "Save the model with safetensors." if pickled else "Copy the model again, or train again.",
        )
    # Without any of them, transformers makes an empty tokenizer, in silence: every word is unknown to it.
    if kind.tokenizer and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} has a model but no tokenizer (tokenizer.json)",
            "A run that was interrupted may leave it out: copy it there from the model that the run started from.",
        )
    return kind


def _settings(run: Path) -> dict[str, Any]:
    text = RunFolder(run).read_config()
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"{run}/config.yaml is not valid YAML: {first_line(error)}", "Take it from a backup."
        ) from error
    return settings if isinstance(settings, dict) else {}


def _max_length(run: Path, data: Mapping[str, Any]) -> int | None:
    length = data.get("max_length")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise CheckpointError(
            f"{run}/config.yaml says data.max_length: {length}", "Write there to how many tokens the run cut its texts."
        )
    return length


def _status(run: Path) -> str:
    with suppress(CheckpointError):
        return str(RunFolder(run).read_report().get("status", ""))
    return ""


def first_line(error: BaseException) -> str:
    """What the error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
