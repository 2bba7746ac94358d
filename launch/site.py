"""What a site or a project wants by default: files of `option: value` lines for `python -m launch slurm`.

The user's `~/.config/largemodel-toolkit/slurm.yaml` comes before the project's `launch/site.yaml`, and the command line
before both. The files are YAML, but no more of it is understood than this, and everything else is refused:

    # a comment
    partition: gpu          # an option's name without its dashes, a colon, a space, the value
    time: "4:00:00"         # quotes may be there
    preflight: false        # true or false, for what is a switch
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.errors import UserError

PROJECT = Path(__file__).resolve().parent / "site.yaml"
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_LINE = re.compile(r"""([A-Za-z][\w-]*):\s+("[^"\\]*"|'[^']*'|[^\s"'#&*!|>%@`\[\]{},?:-][^#]*?|-?\d+)\s*(\s#.*)?""")


def site_files() -> list[Path]:
    """The files that are there; what a later one says counts."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [file for file in (PROJECT, home / "largemodel-toolkit" / "slurm.yaml") if file.is_file()]


def read_site(file: Path) -> dict[str, tuple[str, int]]:
    """Value and line of each key.

    Raises:
        UserError: a line that is no `option: value`, a key that comes twice, or a file that cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}", "Mend it, or remove it.") from error
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, 1):
        if re.fullmatch(r"\s*(#.*)?|---", line):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{file}, line {number}: {line.strip()!r} is no `option: value`",
                "One option a line, as `partition: gpu`; lists, nested keys and other YAML are not understood here.",
            )
        key, value = match[1].replace("_", "-"), match[2]
        if key in found:
            raise UserError(f"{file}, line {number}: {key} stands in line {found[key][1]} already", "Keep one of them.")
        found[key] = (value[1:-1] if value[0] in "\"'" else value, number)
    return found


def set_defaults(parser: argparse.ArgumentParser, allowed: Mapping[str, argparse.Action]) -> None:
    """Make the values of the site's files the parser's defaults.

    Args:
        parser: whose defaults are set.
        allowed: the options that a file may hold, by name without dashes.

    Raises:
        UserError: an option that is unknown or not for such a file, or a value that it does not take.
    """
    for file in site_files():
        for key, (value, number) in read_site(file).items():
            where = f"{file}, line {number}"
            if key not in allowed:
                near = difflib.get_close_matches(key, list(allowed), n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"{where}: {key} is no option of a site's file.{hint}", f"There are: {', '.join(allowed)}."
                )
            action = allowed[key]
            parser.set_defaults(**{action.dest: _converted(action, value, where)})


def _converted(action: argparse.Action, value: str, where: str) -> Any:
    option = action.option_strings[0]
    if action.nargs == 0:
        if value.lower() not in TRUTH:
            raise UserError(f"{where}: {option} is true or false, not {value!r}", "Write one of the two.")
        return TRUTH[value.lower()]
    try:
        converted = action.type(value) if callable(action.type) else value
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{where}: {option} {value}: {error}", "See `python -m launch slurm --help`.") from error
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{where}: {option} {value} is not one of {', '.join(action.choices)}", "Choose one.")
    return [converted] if isinstance(action, argparse._AppendAction) else converted
