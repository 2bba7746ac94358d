"""The command line: what it lists and refuses, how fast it answers, and how it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.parity.job import tiny_bert, tiny_tokenizer
from toolkit import samples
from toolkit.cli import COMMANDS, Command, Group, main

TOOLKIT = [sys.executable, "-m", "toolkit.cli"]
# One thread: on busy cores, two of them would wait for each other over so small a model.
# Buffered as on the machine of a user, whatever the one of the tests has set.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PYTHONUNBUFFERED": ""}
SLOW = {"torch", "transformers", "datasets", "accelerate", "numpy", "tyro", "pydantic", "matplotlib"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as far as predictions and reports read it."""
    folder = tmp_path_factory.mktemp("runs") / "001"
    tiny_bert().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "config.yaml").write_text("data:\n  max_length: 16\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More texts than a pipe holds results of."""
    file = tmp_path_factory.mktemp("texts") / "many.txt"
    file.write_text("".join(f"w{2 + i % 90} w{2 + i % 7}\n" for i in range(3000)))
    return file


def toolkit(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOLKIT, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)


def flat(panel: str) -> str:
    """The words of an error panel, without its frame."""
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in panel.splitlines()).split())


# What it answers at once


def test_help_lists_every_command_at_once() -> None:
    script = (
        "import sys\nfrom toolkit.cli import main\ncode = main(['--help'])\n"
        f"print('slow:', sorted({SLOW} & sys.modules.keys()))\nsys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("slow: []\n")
    # Its own seconds, not those of the clock: other tests may run beside. Idle, it takes 0.15.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    lines = done.stdout.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, command.summary] for line in lines)
        assert len(command.summary) < 80


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, Command)])
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: toolkit {name} ")
    assert "--debug" in out


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if isinstance(command, Group)])
def test_help_of_a_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: toolkit {name} COMMAND …\n")
    assert f"`toolkit {name} COMMAND --help` tells its options." in out
    assert main([name]) == 2
    assert out.strip() in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "toolkit 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["pedict", "run"],
            "there is no command 'pedict'. Did you mean 'predict'? → Commands: checkpoint, data, doctor, gguf, matrix,",
        ),
        (["checkpoint", "lss", "run"], "there is no command 'lss'. Did you mean 'ls'? → Commands: ls,"),
        (["checkpoint", "--jsn"], "unrecognized arguments: --jsn. → See `toolkit checkpoint --help`"),
        (["--verson"], "unrecognized arguments: --verson. Did you mean '--version'?"),
        (["predict"], "the following arguments are required: RUN. → See `toolkit predict --help`."),
        (["report"], "the following arguments are required: RUN. → See `toolkit report --help`."),
        (["report", "nowhere"], "nowhere: no files of a run"),
        (["samples", "fetch"], "there is no sample to fetch → Samples: minilm,"),
        (["samples", "fetch", "minilmm"], "there is no sample 'minilmm'. Did you mean 'minilm'?"),
        (["samples", "list", "minilm"], "Use `toolkit samples fetch NAME`"),
        (["samples", "drop"], "invalid choice: 'drop'"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in flat(err)
    assert "Traceback" not in err


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "predict" in capsys.readouterr().err


def test_a_mistake_in_a_process_of_its_own(run: Path) -> None:
    """Exit code and streams."""
    done = toolkit("predict", run.parent / "002", "w3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean '001'?" in flat(done.stderr)
    done = toolkit("predict", run.parent / "002", "w3", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "CheckpointError: the run" in done.stderr
    assert "importlib" not in done.stderr.splitlines()[-1]


def imported_by(*words: object) -> tuple[str, set[str]]:
    """What a command that is refused says, and which slow packages were imported for that, in a process of its own."""
    script = (
        "import sys\nfrom toolkit.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(*({SLOW} & sys.modules.keys()))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    return flat(done.stderr), set(done.stdout.split())


def test_mistakes_are_told_before_anything_slow_is_imported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("id,review\n1,w3\n2,\n")
    file = ["--file", tmp_path / "texts.csv"]
    for words, message in (
        ([run, *file, "--jsn"], "Did you mean '--json'?"),
        ([run, *file, "--output", "out.pdf"], "Name a .csv or a .jsonl file"),
        ([run.parent / "002", *file], "Did you mean '001'?"),
        ([run, *file, "--text", "reviw"], "Did you mean 'review'?"),
        ([run, *file, "--text", "review"], "texts.csv, line 3: the text is empty"),
    ):
        err, slow = imported_by("predict", *words)
        assert message in err
        assert slow == set()


def test_an_untested_version_is_told_before_torch_is_imported(run: Path, tmp_path: Path) -> None:
    information = tmp_path / "largemodel_toolkit-9.9.dist-info"
    information.mkdir()
    metadata = "Metadata-Version: 2.4\nName: largemodel-toolkit\nVersion: 9.9\nRequires-Dist: torch>=99\n"
    (information / "METADATA").write_text(metadata)
    for name in ("torch", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('too early')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [*TOOLKIT, "predict", run, "w3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "LaunchError" in done.stderr
    assert "installed packages are outside the tested range: torch" in flat(done.stderr)


# The commands


def test_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == run / "report.html"
    assert "max_length: 16" in page.read_text(encoding="utf-8")


def test_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fetched = samples.fetch("bbc-news", quiet=True)
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path))
    assert main(["samples"]) == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines()[2:] if not line.startswith(" ")}
    assert rows.keys() == samples.SAMPLES.keys()
    assert all(line.split()[-1] == "no" for line in rows.values())
    assert "2,225 rows" in rows["bbc-news"]
    assert "22.7 M parameters" in rows["minilm"]
    assert str(tmp_path) in err
    # The cache of another run of the tests: fetched once, found by the command.
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / fetched.name).symlink_to(fetched)
    assert main(["samples", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:] if not line.startswith(" ")}
    assert rows["bbc-news"].split()[-1] == "yes"
    assert rows["sarcasm"].split()[-1] == "no"
    assert main(["samples", "fetch", "bbc-news"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "data.jsonl").is_file()


# How it ends


def test_ctrl_c_leaves_what_was_computed(run: Path) -> None:
    """Unbuffered, which is the harder case: the signal may come as soon as the first line has gone out."""
    with subprocess.Popen(
        [*TOOLKIT, "predict", run, "-", "--json", "--batch", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write("w3\nw4\nw5\n")  # a whole window of two, and one that waits for more
        process.stdin.flush()
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        lines = [first, *process.stdout]
        err = process.stderr.read()
    assert [json.loads(line)["text"] for line in lines] == ["w3", "w4"]
    assert err == "2 texts were classified\ninterrupted\n"


def test_a_closed_pipe_is_no_error(run: Path, many: Path) -> None:
    with subprocess.Popen(
        [*TOOLKIT, "predict", run, "--file", many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().split() == ["text", "label", "score"]
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == ""


def test_a_pipe_that_was_closed_before_the_first_word() -> None:
    """So little output waits in a buffer until the process ends, and must not be complained of then either."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*TOOLKIT, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False, env=ENVIRONMENT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_bar_on_a_terminal_does_not_touch_the_results(run: Path, many: Path) -> None:
    terminal, side = os.openpty()
    shown = bytearray()

    def drain() -> None:
        try:
            while part := os.read(terminal, 65536):
                shown.extend(part)
        except OSError:  # so the system says that the other side is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    words = [*TOOLKIT, "predict", run, "--file", many, "--json", "--top", "1"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=side, timeout=120, check=True, env=ENVIRONMENT)
    os.close(side)
    reader.join(timeout=30)
    os.close(terminal)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(line["text"] + "\n" for line in lines) == many.read_text()
    assert b"classifying" in shown
    assert b"/3000" in shown
