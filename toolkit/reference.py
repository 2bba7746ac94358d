"""What the model thought of answers before it was trained: computed once in the life of a run, and kept in its folder.

So no second model lies beside the one that is trained, whatever the strategy, and a run that goes on after a kill is
held against the same figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from toolkit.config import AdapterConfig, PreferenceConfig
from toolkit.data.loader import Loader
from toolkit.errors import CheckpointError, ConfigError
from toolkit.folders import written_aside
from toolkit.prompts import OTHERWISE, PROMPTS
from toolkit.session import Session
from toolkit.tasks import REFERENCE_FREE, Preferences, Scores

FOLDER, FILE = "reference", "log_probabilities.safetensors"
_TABLE = "log_probabilities"


def check_reference(adapter: AdapterConfig, preference: PreferenceConfig) -> None:
    """Refuse adapters with which the model that training begins with is no reference.

    Raises:
        ConfigError: naming the reason and the remedy.
    """
    if adapter.name in PROMPTS and preference.loss not in REFERENCE_FREE:
        raise ConfigError(
            f"--preference.loss {preference.loss} with --adapter.name {adapter.name}: the model is held against the "
            "one that training begins with, in which virtual tokens stand that nobody has trained",
            f"{OTHERWISE} Or use a loss without a reference (--preference.loss orpo).",
        )


def score_reference(session: Session, task: Preferences, loaders: Iterable[Loader]) -> None:
    """Set `task.reference`: from the model as it is at the beginning of the run, or from the run's folder later.

    To be called on all ranks after `session.setup` and before anything is trained or evaluated.

    Args:
        session: of the run.
        task: of its loaders; nothing is done where its loss asks for no reference.
        loaders: of all splits.

    Raises:
        CheckpointError: a run that goes on has lost the file, or it is damaged.
        Interrupted: a signal asked to stop; the next start begins anew.
    """
    if task.name in REFERENCE_FREE:
        return
    folder = session.folder.path / FOLDER
    # One rank looks, for a file may come to be seen by the others later.
    if not session.world.on_main((folder / FILE).exists):
        if session.steps_done:
            raise CheckpointError(
                f"{folder / FILE} is gone: what the model thought before training cannot be computed any more",
                "Bring it back, or begin anew in another folder (--run.dir).",
            )
        table = _scored(session, task, loaders)
        session.world.on_main(lambda: _write(folder, table))
    task.reference = session.world.on_main(lambda: _read(folder, task.pairs)).to(session.world.device)


def _scored(session: Session, task: Preferences, loaders: Iterable[Loader]) -> torch.Tensor:
    scores = Scores(task)
    for loader in loaders:
        session.evaluate(loader, "reference", task=scores)
    # A pair that is repeated within the epoch may have been dealt to several ranks.
    total = session.world.sum(torch.cat([scores.table, scores.seen], dim=1).to(session.world.device)).cpu()
    return total[:, :2] / total[:, 2:].clamp(min=1)


def _write(folder: Path, table: torch.Tensor) -> None:
    with written_aside(folder) as aside:
        save_file({_TABLE: table.contiguous()}, aside / FILE)


def _read(folder: Path, pairs: int) -> torch.Tensor:
    try:
        table = load_file(folder / FILE)[_TABLE]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder / FILE} cannot be read: {error}", "Bring it back, or begin anew.") from error
    if table.shape != (pairs, 2):
        raise CheckpointError(
            f"{folder / FILE} is of {len(table)} pairs, and the data has {pairs}", "Bring back the right one."
        )
    return table
