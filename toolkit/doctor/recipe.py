"""`python -m toolkit.doctor.recipe FILE OPTIONS …`: a recipe's settings, and which prepared data they mean.

A process of its own, because it imports what the recipe does. It prints one JSON object a line, as `Probe` reads it:
`settings` (flat, without secrets), `digest` (with them), `run` (the run's folder as the settings name it); `hub` (ids
of the hub among the names, and whether they can be had); then `data` (fingerprints of what is prepared) and
`unprepared` (of what is not); or `mistake` and `remedy`. Nothing is downloaded but samples, nothing prepared, no model
loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import constants

from toolkit.config import CheckpointConfig, RunConfig, StrategyConfig, parse, plain
from toolkit.doctor.probes import say
from toolkit.environment import RENDEZVOUS
from toolkit.errors import ConfigError, ToolkitError
from toolkit.look import NotPrepared, SeenEnough, looking
from toolkit.report import redact

_NAMED = ("model", "tokenizer", "data")
_OF_ONE_NODE = ("run.debug",)
_HUB_SECONDS = 5.0


def main() -> None:
    """What the words of this process mean."""
    file, *options = sys.argv[1:]
    with open(os.dup(1), "w", encoding="utf-8") as out, contextlib.redirect_stdout(sys.stderr):  # noqa: PTH123
        try:
            look(Path(file), options, out)
        except ToolkitError as error:
            say(out, mistake=error.message, remedy=error.remedy)


def look(file: Path, options: list[str], out: TextIO) -> None:
    """Say first what the settings are, then what is there of the data.

    Raises:
        ToolkitError: a mistake in the settings, or data that cannot be read.
    """
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
    sys.argv = [str(file), *options]
    recipe = _imported(file)
    if not hasattr(recipe, "Config") or not hasattr(recipe, "main"):
        raise ConfigError(f"{file} is no recipe: it has no Config and main", "Name a file like recipes/bert_cls.py.")
    config = _parsed(recipe.Config, options)
    values = plain(config)
    flat = {key: value for key, value in _flat(redact(values)) if key not in _OF_ONE_NODE}
    run = config.run.dir or Path("runs") / file.stem / (config.run.name or "")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    say(out, settings=flat, digest=digest, run=str(run.expanduser().absolute()))
    say(out, hub=_hub(list(_hub_ids(values))))
    say(out, **_data(recipe.main, config))


def _imported(file: Path) -> Any:
    """The recipe as a module, from wherever it lies; what is beside it can be imported, as when it is started."""
    spec = importlib.util.spec_from_file_location("recipe", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is no Python file", "Name the file of a recipe.")
    sys.path.insert(0, str(file.resolve().parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module  # where dataclasses look for the names of their types
    spec.loader.exec_module(module)
    return module


def _parsed(config_class: type[Any], options: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse(config_class, options)
    except SystemExit as end:
        lines = [line.strip("│╭╮╰╯─┌┐└┘- ") for line in said.getvalue().splitlines()]
        fact = " ".join(filter(None, lines))[:600] if end.code else "an option that only shows something"
        raise ConfigError(fact or "the options cannot be read", f"See `python {sys.argv[0]} --help`.") from None


def _data(main: Any, config: Any) -> dict[str, Any]:
    """Run the recipe as far as its data: alone, in a folder that is no run's."""
    alone = {
        "strategy": StrategyConfig(),
        "checkpoint": CheckpointConfig(resume="never"),
        "run": RunConfig(dir=Path(tempfile.gettempdir()) / f"no-run-{os.getpid()}"),
    }
    config = dataclasses.replace(config, **alone)
    with looking() as seen:
        try:
            main(config)
        except NotPrepared as missing:
            return {"data": seen, "unprepared": str(missing)}
        except SeenEnough:
            pass
    return {"data": seen, "unprepared": ""}


def _hub_ids(values: Mapping[str, Any]) -> Iterator[str]:
    for section in _NAMED:
        names = values.get(section, {}).get("name") or ()
        for name in (names,) if isinstance(names, str) else names:
            path = Path(name).expanduser()
            is_path = name.startswith(("sample:", ".", "/", "~")) or name.count("/") > 1 or path.exists()
            # A file that is missing is no hub id either, and the look at the data says so.
            if not is_path and not (section == "data" and path.suffix):
                yield name


def _hub(ids: list[str]) -> dict[str, Any]:
    """Which of these the cache seems to have, and whether the hub answers."""
    found: dict[str, Any] = {"ids": ids, "cached": [], "answers": False, "reason": "", "endpoint": constants.ENDPOINT}
    found["offline"] = constants.HF_HUB_OFFLINE
    if not ids:
        return found
    folders = {name: [f"{kind}--{name.replace('/', '--')}" for kind in ("models", "datasets")] for name in ids}
    cache = Path(constants.HF_HUB_CACHE)
    found["cached"] = [name for name in ids if any((cache / folder / "snapshots").is_dir() for folder in folders[name])]
    if constants.HF_HUB_OFFLINE:
        return found
    answers: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
            answers.append("")
        except urllib.error.HTTPError:
            answers.append("")
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)  # a name server may be silent for longer
    thread.start()
    thread.join(_HUB_SECONDS)
    reason = answers[0] if answers else f"silent for {_HUB_SECONDS:.0f} s"
    return found | {"answers": not reason, "reason": reason}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    main()
