"""`python -m launch COMMAND …`: how processes start."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from launch import accelerate_config, jobs, local, run, slurm, ssh
from launch.errors import UserError

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "config": ("print a configuration file for `accelerate launch --config_file`", accelerate_config.main),
    "local": ("start a recipe on this machine", local.main),
    "ssh": ("start a recipe on a few machines without a scheduler", ssh.main),
    "run": ("run `accelerate launch`, pass on signals, restart after a crash, leave nothing behind", run.main),
    "slurm": ("submit a recipe as a job of SLURM that saves and queues itself again in time", slurm.main),
    "status": ("how such a job stands, and its run", jobs.status),
    "logs": ("what its nodes and ranks print", jobs.logs),
    "stop": ("let it save and end", jobs.stop),
    "resume": ("submit it again, on other nodes if asked", jobs.resume),
}
"""What every command does, in one line, and what runs it with the words after its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process; the exit code is 2 after a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="python -m launch",
        description=__doc__,
        epilog="commands:\n" + "\n".join(f"  {name:8}{summary}" for name, (summary, _) in COMMANDS.items()),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS)
    command = parser.parse_args(words[:1]).command
    try:
        return COMMANDS[command][1](words[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
