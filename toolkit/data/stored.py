"""Three splits and their facts in a folder, as `prepared` keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, load_from_disk

from toolkit.data.files import ROLES, Role
from toolkit.data.mapping import ROWS_FOR_A_BAR, quiet

_FACTS = "facts.json"


def save_splits(folder: Path, splits: Mapping[Role, Dataset], facts: Mapping[str, Any]) -> None:
    """Write the splits, and then their facts (fit for JSON)."""
    for name, rows in splits.items():
        with quiet(bars=len(rows) >= ROWS_FOR_A_BAR):
            rows.save_to_disk(str(folder / name))
    counts = {name: len(rows) for name, rows in splits.items()}
    content = {"rows": counts, "facts": dict(facts)}
    (folder / _FACTS).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_splits(folder: Path) -> tuple[dict[Role, Dataset], dict[str, Any]] | None:
    """What was written there; None where there is nothing, or not all of it."""
    try:
        content = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with quiet(bars=False):
            splits = {name: load_from_disk(str(folder / name)) for name in ROLES}
        whole = all(len(splits[name]) == content["rows"][name] for name in ROLES)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None
    return (splits, content["facts"]) if whole else None
