"""Data sets of the Hugging Face hub: found out within half a minute whether the hub answers, else from its cache.

`load_dataset` alone tries an unreachable hub again and again (six times, each for every address of the host), and
then takes whatever revision its cache holds. So the hub is asked once, briefly, for the commit; the rest follows
from that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
from datasets import Dataset, load_dataset
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from toolkit import samples
from toolkit.data.files import ROLE_OF_WORD, Labelled, Role, labelled
from toolkit.data.mapping import quiet
from toolkit.errors import DataError

PATIENCE = 20.0
"""Seconds that the hub has to answer in."""


@dataclass(frozen=True)
class HubData:
    """A data set of the hub at one commit; `warning` where the hub could not be asked for it."""

    name: str
    commit: str
    warning: str = ""


def find(name: str, revision: str | None) -> HubData:
    """The commit of a hub id, from the hub or, where that cannot be reached, from the cache.

    Args:
        name: `OWNER/NAME` or `NAME`.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        DataError: there is no such data set or revision, or the hub is silent and the cache does not have it.
    """
    cached = _cached_commits(name)
    if revision in cached:
        return HubData(name, revision)  # a commit never changes: no need to ask
    answer = _ask(name, revision)
    if isinstance(answer, str):
        return HubData(name, answer)
    if isinstance(answer, GatedRepoError):
        raise DataError(f"'{name}' is a gated data set of the hub", "Ask for access on its page, and `hf auth login`.")
    if isinstance(answer, RepositoryNotFoundError):
        raise _nowhere(name, f"the hub has no data set '{name}' (or hides it from you)")
    if isinstance(answer, RevisionNotFoundError):
        raise DataError(f"the data set '{name}' has no revision '{revision}'", "Correct --data.revision.")
    if revision is None and cached:
        return HubData(
            name,
            cached[-1],
            f"the hub cannot be reached ({_brief(answer)}): '{name}' is taken from the cache, at {cached[-1]}",
        )
    held = f" The cache holds it at {', '.join(cached)}: name one with --data.revision." if cached else ""
    raise _nowhere(name, f"the hub cannot be reached for '{name}' ({_brief(answer)})", held)


def read_hub(hub: HubData, text: str, label: str | None, group: str | None = None) -> Iterator[tuple[Role, Labelled]]:
    """The splits of a hub data set, as `train`, `validation` and `test`.

    A validation or test split without a single label (its labels are kept secret) is left out.

    Raises:
        DataError: it cannot be loaded, has no training split, or lacks a column.
    """
    for role, rows in hub_splits(hub).items():
        with quiet(bars=False):
            found = labelled(rows, text, label, f"{hub.name} ({role})", group)
        if role == "train" or label is None or found.labels.null_count < len(found.labels):
            yield role, found


def hub_splits(hub: HubData) -> dict[Role, Dataset]:
    """The splits of a hub data set as they are, by their role; `train` is among them.

    Raises:
        DataError: it cannot be loaded, or has no training split.
    """
    with quiet(bars=True):
        splits = _load(hub)
    chosen = {ROLE_OF_WORD[split]: rows for split, rows in splits.items() if split in ROLE_OF_WORD}
    if len(splits) == 1:
        chosen = {"train": next(iter(splits.values()))}
    if "train" not in chosen:
        raise DataError(
            f"'{hub.name}' has no split 'train'; it has {', '.join(splits)}",
            "Save the splits that you want as train.parquet, validation.parquet and test.parquet in one folder.",
        )
    return chosen


def _load(hub: HubData) -> dict[str, Dataset]:
    folders = _cached_folders(hub.name, hub.commit)
    try:
        if len(folders) == 1:
            settings, version, commit = folders[0].parts[-3:]
            builder = Cache(
                dataset_name=hub.name.split("/")[-1],
                repo_id=hub.name,
                config_name=settings,
                version=version,
                hash=commit,
            )
            return dict(builder.as_dataset())
        return dict(load_dataset(hub.name, revision=hub.commit))
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which data set
        raise DataError(
            f"'{hub.name}' could not be loaded from the hub: {_brief(error)}",
            "Data sets with several configurations, and those that need a script, are not supported: save the one "
            "that you want as Parquet files in a folder, and give that to --data.name.",
        ) from error


def _cached_folders(name: str, commit: str) -> list[Path]:
    """Where the library keeps a prepared data set: CACHE/OWNER___NAME/CONFIGURATION/VERSION/COMMIT."""
    *owner, last = name.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(last)])
    found = (path for path in root.glob(f"*/*/{commit}") if (path / "dataset_info.json").is_file())
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _cached_commits(name: str) -> list[str]:
    """The commits in the cache, the newest last."""
    names = [path.name for path in _cached_folders(name, "*")]
    return [commit for commit in dict.fromkeys(names) if re.fullmatch(r"[0-9a-f]{40}", commit)]


def _ask(name: str, revision: str | None) -> str | Exception:
    """The commit, or why there is none. Takes `PATIENCE` at most: a name server may be silent for minutes."""
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            api = HfApi(endpoint=datasets.config.HF_ENDPOINT)
            answer.append(str(api.dataset_info(name, revision=revision, timeout=PATIENCE / 2).sha))
        except Exception as error:  # handed over to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=ask, name="ask the hub", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else TimeoutError(f"no answer within {PATIENCE:.0f} s")


def _nowhere(name: str, fact: str, more: str = "") -> DataError:
    return DataError(
        f"--data.name: {fact}; and there is no file or folder of that name in {Path.cwd()}",
        f"Give a local file or folder, or one of the samples: {_samples()}.{more}",
    )


def _samples() -> str:
    return ", ".join(f"sample:{name}" for name in samples.names("data"))


def _brief(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
