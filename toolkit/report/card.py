"""A model card: what a saved model is, for whoever gets its folder without the run's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit.report.figures import figures_in, titled

_SECTIONS = ("model", "data", "preference", "contrast", "strategy", "training")
"""Of the plan, those that a reader of the model asks for."""
_VERSIONS = ("largemodel-toolkit", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDERS = re.compile(r"(?<![\w.])(?:~|\.{1,2})?/(?:[^\s/,]+/)+")


def model_card(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read.

    Folders of this machine are left out of it, and what differs between two runs of one command, as their seconds: what
    is saved after a kill is to be what would have been saved without it.

    Args:
        report: report.json of a finished run.
        manifest: manifest.json of it.
    """
    settings = manifest["requested"]
    # Not every recipe starts from a model that has a name, or has layers to adapt.
    recipe, name = _recipe(manifest["command"]), settings.get("model", {}).get("name")
    adapter = settings.get("adapter", {}).get("name", "none")
    front: dict[str, Any] = {"library_name": "transformers" if adapter == "none" else "peft"}
    if name and _HUB_ID.fullmatch(name) and not Path(name).exists():
        front["base_model"] = name
    front["tags"] = [recipe.replace("_", "-"), *([adapter] if adapter != "none" else [])]
    plan = report.get("plan", {})
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---\n",
        f"# {_without_folders(name) if name else 'A new model'}, by {recipe}\n",
        "The licences of the model that it started from and of its data hold for it too.\n",
        "## On held-out data\n",
        _table(("figure", "before training", "after"), _figures(report)),
        "## How it was made\n",
        _table(("", "", ""), _rows(plan)),
        f"Seed {manifest['seed']}; data {manifest['data_fingerprint']}; {_commit(manifest)}"
        f"{report['steps']:,} steps.\n",
        _table(("package", "version"), [(n, v) for n, v in manifest["versions"].items() if n in _VERSIONS]),
    ]
    return "\n".join(parts)


def _recipe(command: str) -> str:
    found = re.search(r"(\w+)\.py", command)
    return found[1] if found else "a recipe"


def _commit(manifest: Mapping[str, Any]) -> str:
    git = manifest.get("git")
    return f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}; " if git else ""


def _figures(report: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    before, after = report.get("before") or {}, report.get("test") or {}
    for key, name in ((figure.key, titled(figure.name)) for figure in figures_in(after)):
        yield name, _number(before.get(key)), _number(after[key])


def _rows(plan: Mapping[str, Mapping[str, str]]) -> Iterable[tuple[str, str, str]]:
    for section in _SECTIONS:
        for number, (name, value) in enumerate(plan.get(section, {}).items()):
            yield section if number == 0 else "", name, _without_folders(str(value))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else ""


def _without_folders(text: str) -> str:
    return _FOLDERS.sub("", text)


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    cells = (" | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)
