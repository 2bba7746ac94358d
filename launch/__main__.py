"""`python -m launch config …`: write a configuration for `accelerate launch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launch.accelerate_config import STRATEGIES, Start, render


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 after a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    config = commands.add_parser("config", help="print a configuration file for `accelerate launch --config_file`")
    config.add_argument("--processes", type=int, default=1, help="of all nodes together (default: 1)")
    config.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="what to ask the recipe for")
    config.add_argument("--cpu", action="store_true", help="CPU ranks, even where there are GPUs")
    config.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    config.add_argument("--address", default="", help="of the first node, as the others see it")
    config.add_argument("--port", type=int, default=29500, help="on the first node (default: 29500)")
    options = vars(parser.parse_args(argv))
    del options["command"]
    try:
        print(render(Start(**options)), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
