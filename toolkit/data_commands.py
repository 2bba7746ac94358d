"""`toolkit data`: clean and split data into files, and look at what a recipe makes of it."""

from __future__ import annotations

import importlib
import runpy
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from toolkit.errors import ConfigError


def _show_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="file of a recipe, as recipes/sft.py")
    parser.add_argument("--samples", metavar="N", type=int, default=3, help="how many (default: 3)")
    parser.epilog = "All other options are the recipe's, as --data.name FILE."


def _show(arguments: Namespace) -> int:
    recipe, samples = arguments.recipe, arguments.samples
    if not recipe.is_file():
        raise ConfigError(f"there is no recipe {recipe}", "Name its file, as recipes/sft.py.")
    if samples < 1:
        raise ConfigError(f"--samples {samples} shows nothing", "Ask for one or more.")
    sys.argv = [str(recipe), *arguments.rest, "--run.show", str(samples)]
    runpy.run_path(str(recipe), run_name="__main__")
    return 0


_SUMMARY = "show training samples as the model would see them: what is learnt, given, padding"
_PREPARE = "collect, clean and split rows into files, with a page that says what was taken out and why"
_BACK = "write training texts in other words: translated to another language and back"
COMMANDS = {
    "back-translate": (
        _BACK,
        lambda parser: importlib.import_module("toolkit.back_translation").add_arguments(parser),
        lambda arguments: int(importlib.import_module("toolkit.back_translation").run(arguments)),
    ),
    "prepare": (
        _PREPARE,
        lambda parser: importlib.import_module("toolkit.prepare").add_arguments(parser),
        lambda arguments: int(importlib.import_module("toolkit.prepare").run(arguments)),
        True,
    ),
    "show": (_SUMMARY, _show_arguments, _show, True),
}
"""Name → summary, arguments, what it does, and whether it takes options that it does not know."""
