"""The command `toolkit`: finds the sub-command, runs it, and turns a user's mistake into one screen and exit code 2.

argparse and not tyro, which recipes use: tyro takes most of a second to import, and `--help` is to be there at once.
For the same reason a sub-command's module is imported when it has been chosen, and not before.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from toolkit.errors import USER_ERROR_EXIT_CODE, ConfigError, ToolkitError, nearest
from toolkit.report import Console, write_html
from toolkit.report.console import PLAIN_WIDTH

INTERRUPTED_EXIT_CODE = 130
BROKEN_PIPE_EXIT_CODE = 141  # what a shell shows of a program that SIGPIPE ends

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        summary: what it does, in one line.
        add_arguments: adds its options to a parser.
        run: does it, and returns the exit code; a mistake of the user is a `ToolkitError`.
        passes_on: options that it does not know are not refused, but given to `run` as `rest`.
        takes_more: words behind -- are not its own, but given to `run` as `rest`.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    passes_on: bool = False
    takes_more: bool = False


@dataclass(frozen=True)
class Group:
    """A command that has commands of its own.

    Attributes:
        summary: what they are about, in one line.
        module: holds them as `COMMANDS`: name → the fields of a `Command`; imported when the group is chosen.
    """

    summary: str
    module: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process.

    Returns:
        0; 2 for a mistake of the user; 130 after Ctrl-C; 141 where the reader of the output went away (`| head`).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = _run(words)
        except SystemExit as stop:  # argparse's, after --help
            code = int(stop.code or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still in the buffer would be complained of at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except ToolkitError as error:
        if "--debug" in words:
            traceback.print_exception(error)
        else:
            Console().error(error)
        return USER_ERROR_EXIT_CODE


def _run(words: list[str]) -> int:
    about = "A distributed training toolkit for large models. Recipes train; these commands do the rest."
    parser = _list_of_commands("toolkit", about, COMMANDS)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    asked = parser.parse_args(words[:1])
    if asked.version:
        print(f"toolkit {importlib.metadata.version('largemodel-toolkit')}")
        return 0
    if asked.command is None:
        parser.print_help(sys.stderr)
        return USER_ERROR_EXIT_CODE
    command = _find(asked.command, COMMANDS)
    if isinstance(command, Group):
        return _run_one_of(command, f"toolkit {asked.command}", words[1:])
    return _run_command(command, f"toolkit {asked.command}", words[1:])


def _run_one_of(group: Group, program: str, words: list[str]) -> int:
    commands = {name: Command(*entry) for name, entry in importlib.import_module(group.module).COMMANDS.items()}
    parser = _list_of_commands(program, group.summary, commands)
    asked = parser.parse_args(words[:1])
    if asked.command is None:
        parser.print_help(sys.stderr)
        return USER_ERROR_EXIT_CODE
    return _run_command(_find(asked.command, commands), f"{program} {asked.command}", words[1:])


def _run_command(command: Command, program: str, words: list[str]) -> int:
    parser = _Parser(prog=program, description=command.summary)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command.passes_on:
        arguments, rest = parser.parse_known_args(words)
        arguments.rest = rest
        return command.run(arguments)
    if command.takes_more:
        own = words.index("--") if "--" in words else len(words)
        arguments = parser.parse_args(words[:own])
        arguments.rest = words[own + 1 :]
        return command.run(arguments)
    # Intermixed, or `RUN --json TEXT` would end at the option: argparse gives `*` nothing before it.
    return command.run(parser.parse_intermixed_args(words))


def _list_of_commands(program: str, about: str, commands: Mapping[str, Command | Group]) -> ArgumentParser:
    parser = _Parser(
        prog=program,
        description=about,
        epilog="commands:\n"
        + "".join(f"  {name:<{max(map(len, commands))}}  {command.summary}\n" for name, command in commands.items())
        + f"\n`{program} COMMAND --help` tells its options.",
        formatter_class=RawDescriptionHelpFormatter,
        usage=f"{program} COMMAND …",
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=SUPPRESS)
    return parser


def _find(name: str, commands: Mapping[str, T]) -> T:
    if name not in commands:
        raise ConfigError(
            f"there is no command '{name}'.{nearest(name, commands)}", f"Commands: {', '.join(commands)}."
        )
    return commands[name]


class _Parser(ArgumentParser):
    """Takes no abbreviation (it would change its meaning with the next option), and raises what argparse prints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        unknown, _, words = message.partition(": ")
        hint = ""
        if unknown == "unrecognized arguments" and words.startswith("-"):
            hint = nearest(words.split()[0].partition("=")[0], self._option_string_actions)
        raise ConfigError(f"{message}.{hint}", f"See `{self.prog} --help`.")


def _of_module(summary: str, module: str, *, takes_more: bool = False) -> Command:
    """A command that a module holds, as its `add_arguments` and `run`; imported when the first of them is called."""
    return Command(
        summary,
        lambda parser: importlib.import_module(module).add_arguments(parser),
        lambda arguments: int(importlib.import_module(module).run(arguments)),
        takes_more=takes_more,
    )


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")


def _report(arguments: Namespace) -> int:
    print(write_html(arguments.run.expanduser()))
    return 0


def _samples_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("list", "fetch"), default="list", help="default: list")
    parser.add_argument("names", metavar="NAME", nargs="*", help="samples to fetch")


def _samples(arguments: Namespace) -> int:
    samples = importlib.import_module("toolkit.samples")  # with numpy, which the other commands can do without
    if arguments.action == "fetch":
        if not arguments.names:
            raise ConfigError("there is no sample to fetch", f"Samples: {', '.join(samples.names())}.")
        for name in arguments.names:
            print(samples.fetch(name))
        return 0
    if arguments.names:
        raise ConfigError(f"{arguments.names[0]} has no effect on the list", "Use `toolkit samples fetch NAME`.")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("name", "kind"):
        table.add_column(heading, no_wrap=True)
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("size", no_wrap=True)
    table.add_column("licence")
    table.add_column("fetched", no_wrap=True)
    folder = samples.cache_folder() / "samples"
    for sample in samples.SAMPLES.values():
        facts = sample.facts
        size = f"{facts['rows']:,} rows" if sample.kind == "data" else f"{facts['parameters'] / 1e6:.1f} M parameters"
        # A folder is given its name when it is whole.
        fetched = "yes" if (folder / sample.folder).is_dir() else "no"
        table.add_row(sample.name, sample.kind, f"{sample.size / 1e6:.0f} MB", size, sample.licence, fetched)
    # Its own width off a terminal, as everywhere: 80 columns would fold a table that goes to a file.
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    RichConsole(width=width, markup=False, emoji=False, highlight=False).print(table)
    print(f"\nthey are kept in {folder}; in a config, their name is sample:NAME", file=sys.stderr)
    return 0


COMMANDS: dict[str, Command | Group] = {
    "checkpoint": Group(
        "list, verify, export, convert or remove the checkpoints of a run", "toolkit.checkpoint.commands"
    ),
    "data": Group("clean and split data into files; show what a recipe makes of them", "toolkit.data_commands"),
    "doctor": _of_module(
        "find what would stop or slow a job, on this or several nodes",
        "toolkit.doctor.command",
        takes_more=True,
    ),
    "gguf": _of_module("write a language model as one GGUF file for llama.cpp, and prove it", "toolkit.gguf.command"),
    "matrix": _of_module(
        "list which strategies, quantizations and adapters go together, and why not", "toolkit.matrix"
    ),
    "merge": _of_module("make adapters part of their base: a whole model, proved to answer alike", "toolkit.merge"),
    "predict": _of_module(
        "put texts into classes, or go on with them: with the model of a run", "toolkit.predict.command"
    ),
    "report": Command("make a run's report.html again and print its path", _report_arguments, _report),
    "samples": Command("list the models and data that need no hub, or fetch one", _samples_arguments, _samples),
    "serve": _of_module("let the model of a run answer over HTTP", "toolkit.serve.command"),
}
"""Every sub-command by name."""

if __name__ == "__main__":
    sys.exit(main())
