"""The documentation is true: its commands run, and the options, paths and links that it names are there.

A page's ```bash blocks are run, in order, in one empty folder beside copies of what a clone holds. What cannot be run
here (installing, GPUs, several nodes, data of the reader) stands in ```console blocks, whose options must parse.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from launch import slurm as launch_slurm
from launch.__main__ import main as launch
from launch.local import divide
from tests.recipes.launching import ROOT, environment
from toolkit.cli import COMMANDS
from toolkit.config import parse
from toolkit.samples import SAMPLES
from toolkit.strategies import STRATEGIES

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*.py") if path.stem != "__init__")

QUICK = ("configuration.md",)
"""Pages whose commands take seconds: they run by default."""
LANGUAGES = {"bash", "console", "text", "python"}
MISSPELT = {"--optim.lrr"}
"""Shown to be refused."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One simple command of a block; `fails` where the block goes on with `||`."""

    block: Block
    words: tuple[str, ...]
    fails: bool


def blocks_of(page: Path) -> Iterator[Block]:
    language, begin, lines = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if begin and line.strip() == "```":
            yield Block(page, begin, language, "\n".join(lines))
            begin = 0
        elif begin:
            lines.append(line)
        elif match := re.fullmatch(r"```(\w*)", line):
            language, begin, lines = match[1], number + 1, []
    assert not begin, f"{page}: the block of line {begin} is not closed"


def commands_of(block: Block) -> Iterator[Command]:
    """Without redirections and here-documents, and with the block's own variables filled in."""
    text = re.sub(r"<<'?(\w+)'?(.*)\n(?:.*\n)*?\1(?:\n|$)", r"\2\n", block.text).replace("\\\n", " ")
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    variables: dict[str, list[str]] = {}
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("|&;<>\n"):
            if words:
                yield Command(block, tuple(words), fails=word == "||")
            words = []
        elif not words and (assigned := re.fullmatch(r"(\w+)=(.*)", word, flags=re.DOTALL)):
            variables[assigned[1]] = assigned[2].split()
        else:
            words += variables.get(word.removeprefix("$"), [word]) if word.startswith("$") else [word]


BLOCKS = [block for page in TEXTS for block in blocks_of(page)]
OF_PAGE = {page: [block for block in BLOCKS if block.page == page and block.language == "bash"] for page in TEXTS}
LINES = [command for block in BLOCKS if block.language in ("bash", "console") for command in commands_of(block)]
STARTS = [command for command in LINES if any(re.fullmatch(r"recipes/\w+\.py", word) for word in command.words)]


def ids(items: list[Any]) -> list[str]:
    return [item.where if isinstance(item, Block) else item.block.where for item in items]


def names_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def keys() -> frozenset[str]:
    """`--section.key` of every recipe."""
    found = set()
    for recipe in RECIPES:
        for field in dataclasses.fields(importlib.import_module(f"recipes.{recipe}").Config):
            if dataclasses.is_dataclass(field.default):
                found |= {f"--{field.name}.{key.name}" for key in dataclasses.fields(field.default)}
    return frozenset(found)


def found_in_texts(pattern: str, texts: list[Path]) -> set[tuple[str, str]]:
    return {
        (names_of(page), match) for page in texts for match in re.findall(pattern, page.read_text(encoding="utf-8"))
    }


# What is looked at in every run


def test_the_collections_are_not_empty() -> None:
    assert len(PAGES) >= 9
    assert RECIPES
    assert len(STARTS) >= 20
    assert {block.language for block in BLOCKS} <= LANGUAGES, "a block in another language would never be looked at"
    assert sum(bool(blocks) for blocks in OF_PAGE.values()) >= 6
    assert all(OF_PAGE[ROOT / "docs" / name] for name in QUICK)
    assert not OF_PAGE[ROOT / "CONTRIBUTING.md"], "its commands would run in nobody's test"


def test_every_option_that_is_named_exists() -> None:
    named = found_in_texts(r"--[a-z]+\.[a-z_]+", TEXTS)
    assert len({key for _, key in named}) > 30
    assert {(page, key) for page, key in named if key not in keys() | MISSPELT} == set()
    assert keys().isdisjoint(MISSPELT)


def test_every_path_that_is_named_exists() -> None:
    named = found_in_texts(
        r"(?<![\w/.-])((?:configs|recipes|toolkit|tests|docs|benchmarks|launch|\.ci)/[\w./*-]*)", TEXTS
    )
    assert len(named) > 30
    assert {(page, path) for page, path in named if not list(ROOT.glob(path.rstrip("./")))} == set()


def test_every_link_leads_somewhere() -> None:
    links = found_in_texts(r"\]\(([^)\s]+)\)", TEXTS)
    assert len(links) > 15
    dead = set()
    for page, link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.add((page, link))
    assert dead == set()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_nothing_leads_out_of_the_repository() -> None:
    """A page is read where there is no network too; and no machine's own paths are in it."""
    # `host` stands for the reader's own.
    assert found_in_texts(r"https?://(?!host/)\S+|\bpypi\b|/root/\S*|/home/\S*", TEXTS) == set()


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    assert {f"({page.name})" for page in PAGES[1:] if page != index} <= set(
        re.findall(r"\(\w[\w-]*\.md\)", index.read_text(encoding="utf-8"))
    )


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("command", STARTS, ids=ids(STARTS))
def test_the_options_of_a_recipe_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    place = next(i for i, word in enumerate(command.words) if re.fullmatch(r"recipes/\w+\.py", word))
    launcher, recipe, options = command.words[:place], command.words[place], list(command.words[place + 1 :])
    if launcher[0] == "timeout":
        launcher = launcher[launcher.index("accelerate") :]
    if launcher[:4] == ("python", "-m", "launch", "run"):
        launcher = ("accelerate", "launch", *launcher[launcher.index("--") + 1 :])
    if launcher == ("python", "-m", "launch", "slurm"):
        dashes = options.index("--") if "--" in options else len(options)
        launch_slurm.parse([recipe, *options[:dashes]])
        launcher, options = ("python",), options[dashes + 1 :]
    if launcher[:2] == ("accelerate", "launch"):
        asked = launch_command_parser().parse_args([*launcher[2:], recipe])
        assert asked.config_file is None or exists(asked.config_file, command.block.page)
    elif launcher == ("python", "-m", "launch", "local"):
        own, options = divide(options)
        assert launch(["local", recipe, *own, "--dry-run"]) == 0
    elif launcher[:4] == ("python", "-m", "launch", "ssh") or launcher[:2] == ("toolkit", "doctor"):
        options = divide(options)[1] if "--" in options else options
    elif launcher == ("toolkit", "data", "show"):
        if "--samples" in options:
            place = options.index("--samples")
            del options[place : place + 2]
    else:
        assert launcher == ("python",)
    if command.fails:
        return
    if "--config" in options and not Path(options[options.index("--config") + 1]).exists():
        place = options.index("--config")
        assert exists(options[place + 1], command.block.page)
        del options[place : place + 2]
    code: Any = 0
    try:
        parse(importlib.import_module(f"recipes.{Path(recipe).stem}").Config, options, quiet=True)
    except SystemExit as end:  # after --help and --print-config, or a mistake
        code = end.code
    assert not code, f"{command.block.where}: {' '.join(command.words)}"


def exists(file: str, page: Path) -> bool:
    """In the repository, in the folder of a run, or made by a block of the same page."""
    made = file.startswith("runs/") or any(f"> {file}" in block.text for block in BLOCKS if block.page == page)
    return made or (ROOT / file).exists()


def test_the_toolkit_commands_exist() -> None:
    named = {command.words[1] for command in LINES if command.words[0] == "toolkit" and len(command.words) > 1}
    assert {"predict", "samples"} <= named
    assert named <= set(COMMANDS)


def test_python_is_python() -> None:
    found = [block for block in BLOCKS if block.language == "python"]
    assert found
    for block in found:
        ast.parse(block.text, block.where)


def test_the_tables_are_complete() -> None:
    """What is listed by hand in a table is what the code holds."""
    samples = (ROOT / "docs" / "samples.md").read_text(encoding="utf-8")
    for sample in SAMPLES.values():
        row = next(line for line in samples.splitlines() if line.startswith(f"| `{sample.name}` "))
        for cell in (sample.licence, f"{sample.size / 1e6:.0f} MB"):
            assert cell in row
        assert f"`{sample.archive}`" in samples
    numbers = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    layouts = [(name, layout) for name, kind in STRATEGIES.items() for layout in kind.layouts[name]]
    for name, layout in layouts:
        assert re.search(rf"^\| `{name}` \| {layout.ranks}\b", numbers, flags=re.MULTILINE), (name, layout)
    page = (ROOT / "docs" / "fine-tune-a-classifier.md").read_text(encoding="utf-8")
    for file in ROOT.glob("configs/bert_cls/*.yaml"):
        accuracy = re.search(r"(?:accuracy|Pearson) (0\.\d+)", file.read_text(encoding="utf-8"))
        assert accuracy
        assert re.search(rf"`configs/bert_cls/{file.name}`[^`]*{accuracy[1]}", page), file
    readme = README.read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in STRATEGIES)
    assert all(f"`recipes/{recipe}.py`" in readme for recipe in RECIPES)
    floors = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path.stem for path in ROOT.glob("toolkit/*") if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {module for module in modules - {"__init__"} if f"`{module}`" not in floors} == set()


# What is run


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as a reader has it, in which nothing has been run yet."""
    for name in ("recipes", "configs", "benchmarks", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run_blocks(page: Path, folder: Path, timeout: float = 540) -> None:
    """The ```bash blocks of a page, each in a shell that stops at the first error; all of them must succeed."""
    assert OF_PAGE[page]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    # Without the reader's own answers to `accelerate config`.
    own = {"PATH": path, "HF_HOME": str(folder / ".cache")}
    for block in OF_PAGE[page]:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            env=environment() | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, f"{block.where} ended with {process.returncode}:\n{block.text}\n\n{out[-6000:]}"


RUN = [
    pytest.param(page, id=page.name, marks=() if page.name in QUICK else pytest.mark.slow)
    for page in PAGES[1:]
    if OF_PAGE[page]
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(page: Path, clone: Path) -> None:
    run_blocks(page, clone)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_main_command_of_the_readme(clone: Path) -> None:
    """It runs, in the time and to the accuracy that the page tells of."""
    text = README.read_text(encoding="utf-8")
    run_blocks(README, clone)
    report = json.loads((clone / "runs" / "bert_cls" / "001" / "report.json").read_text())
    before, after = report["before"]["accuracy"], report["test"]["accuracy"]
    assert after >= 0.94
    assert report["seconds"] < 180
    told = re.search(r"from (0\.\d\d) to (0\.\d\d)\s+on (\d+) held-out", text)
    assert told
    assert (float(told[1]), float(told[2])) == pytest.approx((before, after), abs=0.03)
    assert int(told[3]) == report["test"]["units"]
    assert f"{report['majority']:.3f}" in text
    assert f"{report['steps']} steps" in text
