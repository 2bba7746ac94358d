"""The screen: plain lines off a terminal, a live bar on one, silence on the other ranks."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from rich.cells import cell_len

from toolkit.errors import ConfigError
from toolkit.report import Console
from toolkit.report.console import learning_rate_plot

STEPS = 200
WARM_UP = 20
RATES = [
    3e-5 * (i + 1) / WARM_UP if i < WARM_UP else 1.5e-5 * (1 + math.cos(math.pi * (i - WARM_UP) / (STEPS - WARM_UP)))
    for i in range(STEPS)
]
BEFORE = {"accuracy": 0.2, "macro_precision": 0.04, "macro_recall": 0.2, "macro_f1": 0.0667, "loss": 1.61}
AFTER = {"accuracy": 0.95, "macro_precision": 0.951, "macro_recall": 0.949, "macro_f1": 0.95, "loss": 0.21}


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO) -> Console:
    return Console(out=out, err=out)


class Terminal:
    """A real pseudo-terminal, drained as it is written to."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (40, 120))
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.received = b""
        self.reader = threading.Thread(target=self._drain)
        self.reader.start()

    def _drain(self) -> None:
        while True:
            try:
                self.received += os.read(self.master, 65536)
            except OSError:
                return

    def text(self) -> str:
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return self.received.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    yield terminal
    if not terminal.stream.closed:
        terminal.text()


def use_everything(console: Console) -> None:
    console.plan({"model": {"name": "sample:minilm"}}, RATES)
    console.label_balance({"train": {"体育": 3, "tech": 1}})
    with console.progress(4, 1) as progress:
        for step in (2, 3, 4):
            progress.update(step, 1 / step, 312.4, lr=2e-5)
            console.note(f"a note at step {step}")
            console.evaluation("validation", step, 4)
    console.warn("a warning")
    console.summary(BEFORE, AFTER, 0.25, {"run folder": "runs/x/1"}, "toolkit predict runs/x/1")
    console.error(ConfigError("global_batch = 30 is no multiple of 8.", "Set it to 32."))


def test_off_a_terminal_there_are_no_control_codes(
    monkeypatch: pytest.MonkeyPatch, console: Console, out: io.StringIO
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    use_everything(Console(out=out, err=out))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= 100
    for part in ("sample:minilm", "体育", "a note at step 3", "warning: a warning", "0.9500", "Set it to 32."):
        assert part in text
    assert "validation" not in text


def test_other_ranks_are_silent(out: io.StringIO) -> None:
    use_everything(Console(quiet=True, out=out, err=out))
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_with_notes_above_it(terminal: Terminal) -> None:
    console = Console(out=terminal.stream, err=terminal.stream)
    assert console.is_terminal
    use_everything(console)
    text = terminal.text()
    assert "\x1b[" in text
    # What hides the cursor shows it again.
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "4/4" in plain
    assert "loss 0.2500  lr 2e-05  312.4 samples/s" in plain
    assert "validation" in plain
    for step in (2, 3, 4):
        assert re.search(rf"^a note at step {step}\s*$", plain.replace("\r", "\n"), re.MULTILINE)


def test_an_evaluation_alone_leaves_nothing_behind(terminal: Terminal) -> None:
    console = Console(out=terminal.stream)
    for done in range(5):
        console.evaluation("test", done, 4)
        time.sleep(0.05)
    # An evaluation that ends in an error does not reach its last part.
    console.evaluation("broken", 1, 4)
    console.close()
    console.note("after")
    text = terminal.text()
    assert "test" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2
    # Each of the two bars was erased.
    assert text.count("\x1b[2K") >= 2


def test_lines_come_every_so_many_steps_and_at_the_end(console: Console, out: io.StringIO) -> None:
    with console.progress(25, 4, log_every=10) as progress:
        for step in range(5, 26):
            progress.update(step, 0.5, 100.0, lr=1e-5)
    steps = [line.split("/")[0].removeprefix("step ").strip() for line in out.getvalue().splitlines()]
    assert steps == ["10", "20", "25"]
    assert "loss 0.5000  lr 1e-05  100.0 samples/s" in out.getvalue()


def test_lines_come_by_the_clock_by_default(console: Console, out: io.StringIO) -> None:
    with console.progress(1000, 0) as progress:
        for step in range(1, 501):
            progress.update(step, float("nan"), 100.0)
    assert out.getvalue().splitlines() == [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert len(out.getvalue().splitlines()) == 1
    assert "1/1,000" in out.getvalue()


def test_the_curve_has_its_peak_at_the_end_of_the_warm_up() -> None:
    lines = learning_rate_plot(RATES, width=50, height=5)
    top, bottom, axis = lines[0], lines[4], lines[5]
    assert top.startswith("    3e-05 ┤")
    assert bottom.startswith("        0 ┤")
    start = top.index("┤") + 1
    peak = start + (WARM_UP - 1) * 50 // STEPS
    assert top[peak] == "█"
    assert not top[start:peak].strip("▁▂▃▄▅▆▇ ")
    assert axis[peak] == "┬"
    captions = "\n".join(lines[6:])
    assert "warm-up ends at 20" in captions
    assert "200 (lr " in captions
    assert "step 1" in captions
    assert all(len(line) <= 50 + start for line in lines)


@pytest.mark.parametrize("rates", [[0.1], [0.1] * 3, [0.0, 0.0], [3e-4 * (1 - i / 9) for i in range(9)], RATES * 50])
def test_a_curve_of_any_length_is_drawn(rates: list[float]) -> None:
    lines = learning_rate_plot(rates, width=60)
    assert len(lines) >= 8
    assert f"{len(rates):,} (lr {rates[-1]:.3g})" in "\n".join(lines)
    assert all(len(line) <= 72 for line in lines)


def test_wide_labels_align(console: Console, out: io.StringIO) -> None:
    console.label_balance({"train": {"体育": 30, "sport": 10}, "test": {"体育": 3}})
    rows = [line.rstrip() for line in out.getvalue().splitlines() if "%" in line]
    assert len(rows) == 2
    assert len({cell_len(row) for row in rows}) == 1
    assert "30  75.0 %" in rows[0]
    assert "3 100.0 %" in rows[0]
    assert "0   0.0 %" in rows[1]


def test_many_labels_are_capped(console: Console, out: io.StringIO) -> None:
    console.label_balance({"train": {f"label-{i:03d}": 100 + i for i in range(33)}})
    shown = re.findall(r"label-\d+", out.getvalue())
    assert len(shown) == 20
    assert shown[0] == "label-032"
    assert "… and 13 more" in out.getvalue()


def test_what_data_says_is_neither_markup_nor_control_code(console: Console, out: io.StringIO) -> None:
    label = "[red]x[/red] :smile: \x1b[31m"
    console.plan({label: {label: label}}, [])
    console.label_balance({label: {label: 1}})
    console.note(label)
    console.error(ConfigError(label, label))
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("[red]x[/red] :smile: �[31m") == 8


def test_the_summary_shows_before_and_after(console: Console, out: io.StringIO) -> None:
    command = "toolkit predict runs/x/1 --text " + "'a long text' " * 12
    console.summary(BEFORE, AFTER, 0.25, {"run folder": "runs/x/1"}, command)
    text = out.getvalue()
    rows = {line.split("  ")[0].strip(): line.split()[-3:] for line in text.splitlines() if "0." in line}
    assert rows["accuracy"] == ["0.2000", "0.9500", "+0.7500"]
    assert rows["loss"] == ["1.6100", "0.2100", "-1.4000"]
    assert rows["macro F1"] == ["0.0667", "0.9500", "+0.8833"]
    assert re.search(r"majority label\s+0\.2500", text)
    # It can be copied: it is on one line.
    assert command.strip() in text


def test_a_summary_without_a_test_before_has_dashes(console: Console, out: io.StringIO) -> None:
    console.summary({}, AFTER, 0.25, {}, "")
    assert re.search(r"accuracy\s+–\s+0\.9500", out.getvalue())
    assert "next:" not in out.getvalue()


def test_an_error_fits_one_screen_of_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(ConfigError("\n".join(f"line {i}" for i in range(500)), "Mend line 7."))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) < 40
    for part in ("ConfigError", "line 23", "… and 476 more lines", "→ Mend line 7."):
        assert part in captured.err


def test_a_screen_without_utf8_does_not_end_the_run(tmp_path: Path) -> None:
    script = (
        "from toolkit.report import Console\nconsole = Console()\n"
        "console.plan({'data': {'label': '体育'}}, [0.1, 0.2])\nconsole.note('体育 – done')\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert b"?? ? done" in done.stdout
