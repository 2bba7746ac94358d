"""The attempts of a run: their file, which kills may cut, and how many of them crashed without getting further."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.ledger import Ledger
from toolkit.errors import CheckpointError

BEGIN_AND_WAIT = """
import sys, time
from pathlib import Path
from toolkit.checkpoint.attempts import Attempts
print(Attempts(Path(sys.argv[1])).begin(int(sys.argv[2]), ranks=2), flush=True)
time.sleep(60)
"""


def enter(run: Path, from_step: int, reached: int, status: str = "", error: str = "", ranks: int = 1) -> None:
    """An attempt that has been; without a status it was killed."""
    attempts = Attempts(run)
    number = attempts.begin(from_step, ranks=ranks)
    for rank in range(ranks):
        ledger = Ledger(run, number, rank)
        for step in range(from_step + 1, reached + 1):
            ledger.write(step, 0, 1, [step])
        ledger.close()
    if status:
        attempts.end(status, reached, error)


def statuses(run: Path) -> list[str]:
    return [attempt.status for attempt in Attempts(run).read()]


def test_a_run_without_attempts(tmp_path: Path) -> None:
    assert Attempts(tmp_path).read() == []
    assert Attempts(tmp_path).without_progress() == (0, 0, "")
    assert list(tmp_path.iterdir()) == []


def test_what_is_entered(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "run")  # the folder is yet to be made
    assert attempts.begin(0, ranks=2, strategy="ddp") == 1
    attempts.end("failed", 7, "ConfigError: ü\nsecond line")
    begin, end = map(json.loads, (tmp_path / "run" / "attempts.jsonl").read_text(encoding="utf-8").splitlines())
    assert begin.pop("time").endswith("+00:00")
    assert begin == {
        "attempt": 1,
        "event": "begin",
        "from_step": 0,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "ranks": 2,
        "strategy": "ddp",
    }
    assert end == {"attempt": 1, "event": "end", "status": "failed", "step": 7, "error": "ConfigError: ü\nsecond line"}
    (read,) = attempts.read()
    assert (read.number, read.from_step, read.status, read.ended_at) == (1, 0, "failed", 7)
    assert read.error == "ConfigError: ü\nsecond line"
    assert read.facts["ranks"] == 2


def test_the_current_attempt_runs_and_the_next_start_finds_it_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN_AND_WAIT, str(tmp_path), "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    attempts = Attempts(tmp_path)
    assert [attempt.status for attempt in attempts.read()] == ["killed"]
    assert attempts.begin(0, ranks=2) == 2
    assert [attempt.status for attempt in attempts.read()] == ["killed", "running"]
    assert statuses(tmp_path) == ["killed", "killed"]
    attempts.end("finished", 0)
    assert statuses(tmp_path) == ["killed", "finished"]


def test_a_rewind_is_a_new_attempt_of_the_same_process(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(0)
    attempts.begin(5)
    attempts.end("finished", 9)
    attempts.end("failed", 9, "the report could not be written")  # what is entered last holds
    assert [(a.number, a.from_step, a.status, a.ended_at) for a in attempts.read()] == [
        (1, 0, "rewound", 5),
        (2, 5, "failed", 9),
    ]
    # One that has ended is not rewound by the next.
    attempts.begin(9)
    assert statuses(tmp_path) == ["rewound", "failed", "killed"]


def test_reached_is_the_last_step_in_any_ledger(tmp_path: Path) -> None:
    enter(tmp_path, 0, 4, ranks=2)
    assert Attempts(tmp_path).read()[0].reached == 4
    ahead = tmp_path / "samples" / "attempt_0001" / "rank_00001.jsonl"
    with ahead.open("a") as file:
        file.write('{"step":5,"epoch":0,"samples":1,"ids":[5]}\n{"step":6,"epoch":0,"sam')
    assert Attempts(tmp_path).read()[0].reached == 5
    enter(tmp_path, 3, 3, ranks=2)
    assert Attempts(tmp_path).read()[1].reached == 3


@pytest.mark.parametrize("samples", [1, 20_000, 2_000_000])
def test_reached_where_the_last_line_is_long(tmp_path: Path, samples: int) -> None:
    Attempts(tmp_path).begin(0, ranks=1)
    ledger = Ledger(tmp_path, 1, 0)
    ledger.write(1, 0, samples, range(samples))
    ledger.write(2, 0, samples, range(samples))
    ledger.close()
    assert Attempts(tmp_path).read()[0].reached == 2


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_line_that_a_kill_cut_short_is_mended_by_the_next(tmp_path: Path, kept: int) -> None:
    enter(tmp_path, 0, 0, "failed", "first")
    path = tmp_path / "attempts.jsonl"
    whole = path.read_bytes()
    cut = b'{"attempt": 2, "event": "begin", "from_step": 0, "time": "2026-01-01T00:00:00+00:00", "pid": 1}'[:kept]
    path.write_bytes(whole + cut)
    assert statuses(tmp_path) == ["failed"]
    assert Attempts(tmp_path).begin(3) == 2
    assert path.read_bytes().startswith(whole + b'{"attempt": 2, "event": "begin", "from_step": 3')
    assert [attempt.from_step for attempt in Attempts(tmp_path).read()] == [0, 3]


def test_a_line_that_lacks_its_line_break_alone_is_kept(tmp_path: Path) -> None:
    enter(tmp_path, 0, 0, "finished")
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert statuses(tmp_path) == ["finished"]
    assert Attempts(tmp_path).begin(0) == 2
    assert statuses(tmp_path) == ["finished", "killed"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense", "line 2: it is not a JSON object"),
        ("[1]", "line 2: it is not a JSON object"),
        ("{}", "line 2: it is no beginning or end of an attempt"),
        ('{"attempt": 1, "event": "end"}', "line 2: it is no beginning or end"),
        ('{"attempt": 7, "event": "end", "status": "finished", "step": 1}', "line 2: it is no beginning or end"),
        ('{"attempt": 3, "event": "begin", "from_step": 1}', "line 2: it is no beginning or end"),
        ('{"attempt": 2, "event": "begin", "from_step": null}', "line 2: it is no beginning or end"),
        ('{"attempt": 1, "event": "pause"}', "line 2: it is no beginning or end"),
    ],
)
def test_a_line_that_someone_changed_is_an_error(tmp_path: Path, line: str, why: str) -> None:
    Attempts(tmp_path).begin(0)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=rf"attempts\.jsonl, {why}"):
        Attempts(tmp_path).read()


def test_where_it_cannot_be_written_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"attempts\.jsonl: cannot be written \(File exists\)"):
        Attempts(tmp_path / "run").begin(0)
    (tmp_path / "attempts.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"attempts\.jsonl: cannot be read \(Is a directory\)"):
        Attempts(tmp_path).read()


Past = tuple[int, int, str, str]


@pytest.mark.parametrize(
    ("past", "expected"),
    [
        ([], (0, 0, "")),
        ([(0, 7, "", "")], (1, 7, "")),
        # All killed in the step after 7.
        ([(0, 7, "", ""), (5, 7, "", ""), (5, 7, "", "")], (3, 7, "")),
        # None got past 7, though the last came further than the one before it.
        ([(0, 7, "", ""), (5, 6, "failed", "no memory"), (5, 7, "", "")], (3, 7, "no memory")),
        # Not even back to where they began.
        ([(0, 7, "", ""), (5, 5, "failed", "old"), (5, 5, "failed", "new")], (3, 7, "new")),
        # The last got past all before it, the one before it did not.
        ([(0, 7, "", ""), (5, 6, "", ""), (5, 8, "", "")], (1, 8, "")),
        ([(0, 7, "", ""), (5, 9, "", ""), (5, 9, "", "")], (2, 9, "")),
        ([(0, 9, "failed", "old"), (5, 5, "", ""), (5, 12, "", "")], (1, 12, "")),
        # One that ended in order lies between them, or is the last.
        ([(0, 7, "", ""), (5, 7, "interrupted", ""), (5, 7, "", "")], (1, 7, "")),
        ([(0, 7, "", ""), (5, 7, "", ""), (5, 7, "finished", "")], (0, 0, "")),
        # A process that went back twice and then crashed has crashed once.
        ([(0, 9, "rewound", ""), (5, 9, "rewound", ""), (5, 6, "failed", "loss")], (1, 6, "loss")),
        ([(0, 9, "failed", "loss"), (5, 9, "rewound", ""), (5, 9, "failed", "loss")], (2, 9, "loss")),
    ],
)
def test_crashes_without_progress(tmp_path: Path, past: list[Past], expected: tuple[int, int, str]) -> None:
    for from_step, reached, status, error in past:
        enter(tmp_path, from_step, reached, status, error)
    assert Attempts(tmp_path).without_progress() == expected


def test_nobody_waits_for_numpy_or_torch() -> None:
    code = "import sys, toolkit.checkpoint.attempts; print(*({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
