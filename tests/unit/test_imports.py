"""The directions of imports: each floor of the house stands on those below it, and nobody reaches up or around."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = (
    "errors",
    "arguments",
    "folders",
    "environment",
    "look",
    "fingerprint",
    "lease",
    "signals",
    "watchdog",
    "config",
    "requirements",
    "normalise",
    "text_files",
    "text_scores",
    "world",
    "pace",
    "memory",
    "profiler",
    "samples",
    "order",
    "precision",
    "sharing",
    "networks",
    "models",
    "decoders",
    "recognizers",
    "encoder_decoders",
    "encoders",
    "compute",
    "quantization",
    "low_bit_optim",
    "prompts",
    "adapters",
    "data",
    "image_models",
    "tasks",
    "baselines",
    "probe",
    "optim",
    "strategies",
    "numerics",
    "graphs",
    "engine",
    "generation",
    "error_rates",
    "transcription",
    "checkpoint",
    "progress",
    "recovery",
    "report",
    "embeddings",
    "word_classifier",
    "preview",
    "journal",
    "overview",
    "runs",
    "session",
    "reference",
    "rival",
    "start",
    "plan",
    "predict",
    "merge",
    "gguf",
    "matrix",
    "doctor",
    "serve",
    "prepare",
    "back_translation",
    "data_commands",
    "cli",
)
"""The modules and packages of `toolkit`, lowest first. A new one gets its place here, and in the architecture page."""

LATE = {
    (
        "toolkit.report",
        "toolkit.report.html",
    ): "matplotlib takes a second to import, and every rank imports the package",
    ("toolkit.report", "toolkit.report.card"): "with the names of the page's figures",
    ("toolkit.cli", "toolkit.samples"): "with numpy, which the other commands can do without",
    ("toolkit.data_commands", "toolkit.prepare"): "with datasets, which a listing can do without",
    ("toolkit.data_commands", "toolkit.back_translation"): "with transformers",
    ("toolkit.serve.command", "toolkit.serve.app"): "with Starlette, which not everybody has",
    ("toolkit.serve.command", "toolkit.serve.batching"): "with it",
    ("toolkit.checkpoint.commands", "toolkit.checkpoint.samples_command"): "with numpy, too",
    ("toolkit.checkpoint.commands", "toolkit.checkpoint.joined"): "with torch, which a listing can do without",
    ("toolkit.checkpoint.commands", "toolkit.checkpoint.convert"): "with torch",
    ("toolkit.checkpoint.commands", "toolkit.checkpoint.export"): "with torch and transformers",
    ("toolkit.checkpoint.commands", "toolkit.checkpoint.adapted"): "with torch and transformers",
}
"""Imports of own modules inside of functions, and why they are allowed."""

LIGHT = ("environment", "errors", "config", "requirements", "samples", "report", "predict", "doctor.command", "cli")
"""Modules that must not make a user wait for torch."""

STANDARD_ONLY = sorted(
    path
    for path in (*ROOT.glob("launch/**/*.py"), ROOT / "toolkit/errors.py", ROOT / "toolkit/environment.py")
    if "__pycache__" not in path.parts
)


@dataclass(frozen=True)
class Import:
    """That `importer` names `imported`, as dotted modules; `late` inside of a function."""

    importer: str
    imported: str
    late: bool
    where: str


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for path in ROOT.glob("toolkit/**/*.py") if "__pycache__" not in path.parts)
MODULES = {name_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file, also those inside of functions, under `if`, and by name through importlib."""
    importer = name_of(path)

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{where}: a relative import"
                submodules = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [name if name in MODULES else str(child.module) for name in submodules]
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                first = child.args[0]
                names = [str(first.value)] if isinstance(first, ast.Constant) else []
            yield from (Import(importer, name, late, where) for name in names)
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, inside)

    return visit(ast.parse(path.read_text(encoding="utf-8")), late=False)


def imports(files: list[Path], package: str) -> list[Import]:
    """The imports of a package of this repository in these files."""
    found = [item for path in files for item in imports_of(path)]
    return [item for item in found if item.imported.split(".")[0] == package]


def floor(module: str) -> int:
    """The package itself, which imports nothing of its own, lies below all."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else -1


OWN = imports(FILES, "toolkit")


def test_the_collections_are_not_empty() -> None:
    assert len(FILES) > 40
    assert len(OWN) > 100
    assert len(STANDARD_ONLY) >= 4
    assert any(item.late for item in OWN)


def test_every_module_has_a_floor() -> None:
    missing = {name.split(".")[1] for name in MODULES if "." in name} - set(FLOORS)
    assert missing == set()
    assert len(set(FLOORS)) == len(FLOORS)


def test_nobody_reaches_up() -> None:
    wrong = [item for item in OWN if floor(item.imported) > floor(item.importer)]
    assert wrong == []


def test_nobody_imports_late_to_dodge_that() -> None:
    late = {(item.importer, item.imported) for item in OWN if item.late}
    assert late == set(LATE)


def test_there_is_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for item in OWN:
        if item.importer != item.imported and not item.late:
            graph.setdefault(item.importer, set()).add(item.imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names them


def test_nobody_imports_a_recipe() -> None:
    assert imports(FILES + STANDARD_ONLY, "recipes") == []
    assert imports(FILES, "launch") == []
    assert imports(FILES, "tests") == []


@pytest.mark.parametrize("path", STANDARD_ONLY, ids=name_of)
def test_standard_library_only(path: Path) -> None:
    allowed = sys.stdlib_module_names | ({"launch"} if "launch" in path.parts else {"toolkit"})
    foreign = [item for item in imports_of(path) if item.imported.split(".")[0] not in allowed]
    assert foreign == []


def test_a_recipe_leaves_to_later_what_it_may_not_need() -> None:
    late = "{'matplotlib', 'sklearn', 'deepspeed', 'peft', 'bitsandbytes', 'tensorboard', 'rensa', 'py3langid'}"
    late = late.replace("}", ", 'sacrebleu', 'rouge_score'}")
    code = f"import sys, recipes.bert_cls, recipes.pretrain_lm, recipes.translate; print(*({late} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_what_is_light_does_not_wait_for_torch() -> None:
    modules = [f"toolkit.{name}" for name in LIGHT]
    assert set(modules) <= set(MODULES)
    code = f"import sys, {', '.join(modules)}; print(*({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


READS = """
import collections, sys
read = collections.Counter()
sys.addaudithook(lambda event, args: read.update([str(args[0])]) if event == "open" else None)
{first}
import transformers.models
sources = {{name: times for name, times in read.items() if "/transformers/models/" in name and name.endswith(".py")}}
print(len(sources) > 1000, max(sources.values()))
print(sorted(transformers.models._class_to_module.items()))
"""


def test_the_source_of_transformers_models_is_read_once() -> None:
    with_it, without = (
        subprocess.run(
            [sys.executable, "-c", READS.format(first=first)], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split("\n", 1)
        for first in ("import toolkit", "")
    )
    assert (with_it[0], without[0]) == ("True 1", "True 2")  # 1 without: transformers has mended it, and we can go
    assert with_it[1] == without[1]
    assert "BertModel" in with_it[1]
