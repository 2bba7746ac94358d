"""The command `toolkit doctor`: its options, what it refuses, and how it shows what was found."""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from toolkit.arguments import number, whole
from toolkit.doctor.alone import examine_alone
from toolkit.doctor.findings import as_json, merged, show, verdict
from toolkit.doctor.meeting import Place
from toolkit.doctor.node import Budget, Node
from toolkit.doctor.together import examine_together
from toolkit.errors import ConfigError

FOUND_ERRORS = 1


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="file of a recipe, whose options follow behind --")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--nodes", type=whole(1), metavar="N", default=1, help="nodes of the job (default: 1)")
    parser.add_argument(
        "--rank", type=whole(), metavar="R", help="which of them this is, from 0; each runs this command"
    )
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where they meet: a free port on the node of rank 0")
    parser.add_argument(
        "--port", type=whole(1, 65535), metavar="PORT", help="of the training, on that node (or MASTER_PORT)"
    )
    parser.add_argument(
        "--timeout", type=number(10, 3600), metavar="SECONDS", default=60.0, help="for all of it (default: 60)"
    )
    parser.epilog = "Behind -- stand the options of the recipe; or the recipe, and then its options."


def run(arguments: Namespace) -> int:
    """`toolkit doctor`.

    Returns:
        0, or 1 where there is an error among the findings.

    Raises:
        ConfigError: a mistake in the command line.
    """
    began = time.monotonic()
    recipe, options = _recipe(arguments)
    place = _place(arguments)
    port = arguments.port or _number(os.environ.get("MASTER_PORT", ""))
    with Node(recipe, options, place.nodes, Budget(began, arguments.timeout)) as node:
        examined = examine_alone(node, place, port) if place.nodes == 1 else examine_together(node, place, port)
    findings = merged(examined.findings)
    seconds = time.monotonic() - began
    if examined.told_by:
        print(f"{node.name}: {examined.told_by} tells what was found: {verdict(findings)}", file=sys.stderr)
    elif arguments.json:
        print(as_json(findings, examined.names, seconds, examined.figures))
    else:
        show(findings, examined.names, seconds)
    return FOUND_ERRORS if verdict(findings) == "error" else 0


def _recipe(arguments: Namespace) -> tuple[Path | None, list[str]]:
    words = list(arguments.rest)
    if arguments.recipe is None and words:
        arguments.recipe = words.pop(0)
    if arguments.recipe is None:
        return None, []
    recipe = Path(arguments.recipe)
    if not recipe.is_file():
        raise ConfigError(f"there is no recipe {recipe}", "Name its file, as recipes/sft.py.")
    return recipe, words


def _place(arguments: Namespace) -> Place:
    nodes, rank = arguments.nodes, arguments.rank
    if nodes > 1 and (rank is None or not arguments.rendezvous):
        raise ConfigError("several nodes need --rank and --rendezvous", "Each runs: --nodes N --rank R --rendezvous …")
    if (rank or 0) >= nodes:
        raise ConfigError(f"--rank {rank} is not below --nodes {nodes}", "Ranks count from 0.")
    if not arguments.rendezvous:
        return Place(0, 1, "", 0)
    found = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d{1,5})", arguments.rendezvous)
    if not found or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"--rendezvous {arguments.rendezvous} is not HOST:PORT", "Write it as node1:29400.")
    return Place(rank or 0, nodes, found[1], int(found[2]))


def _number(word: str) -> int:
    return int(word) if word.isdecimal() else 0
