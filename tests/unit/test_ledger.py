"""The ledger of samples and its account: what ranks really wrote, through kills, resumes and other numbers of ranks."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from toolkit.checkpoint import samples_command
from toolkit.checkpoint.account import Account, account
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.ledger import Ledger, write_plan
from toolkit.errors import CheckpointError
from toolkit.order import epoch_order

SEED, BATCH, SAMPLES = 5, 4, 22
PER_EPOCH = 6  # the last step of an epoch has two samples
IDS = [100 + 7 * ((row * 5) % SAMPLES) for row in range(SAMPLES)]  # neither the rows nor in their order

RANK = """
import resource, signal, sys
from pathlib import Path
from tests.unit.test_ledger import enter_steps
from toolkit.checkpoint.ledger import Ledger

run, (attempt, rank, ranks, first, last, limit) = Path(sys.argv[1]), map(int, sys.argv[2:])
if limit:  # the kernel then writes the part of a line that fits, and kills at the rest
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
ledger = Ledger(run, attempt, rank)
for step in enter_steps(ledger, rank, ranks, first, last):
    print(step, flush=True)
ledger.sync()
ledger.close()
"""


def planned(step: int) -> list[int]:
    """The ids of a step in their order."""
    epoch, index = divmod(step - 1, PER_EPOCH)
    rows = epoch_order(SEED, epoch, SAMPLES)[index * BATCH : (index + 1) * BATCH]
    return [IDS[row] for row in rows]


def enter_steps(ledger: Ledger, rank: int, ranks: int, first: int, last: int) -> Iterator[int]:
    """Enter a rank's share of these steps, and give the number of each once it is entered."""
    for step in range(first, last + 1):
        ids = planned(step)
        ledger.write(step, (step - 1) // PER_EPOCH, len(ids), ids[rank::ranks])
        yield step


def start_rank(run: Path, *numbers: int, limit: int = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RANK, str(run), *map(str, (*numbers, limit))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_plan(tmp_path, SEED, BATCH, IDS)
    return tmp_path


def attempt(run: Path, from_step: int, ends: Sequence[int], status: str = "") -> None:
    """An attempt whose ranks have come to these steps; without a status it was killed."""
    attempts = Attempts(run)
    number = attempts.begin(from_step, ranks=len(ends))
    for rank, last in enumerate(ends):
        with closing(Ledger(run, number, rank)) as ledger:
            list(enter_steps(ledger, rank, len(ends), from_step + 1, last))
    if status:
        attempts.end(status, max(ends))


def of_rank(run: Path, number: int, rank: int) -> Path:
    return run / "samples" / f"attempt_{number:04d}" / f"rank_{rank:05d}.jsonl"


def change(path: Path, how: Callable[[list[str]], list[str]]) -> None:
    """Tamper with the lines of a file."""
    path.write_text("".join(how(path.read_text().splitlines(keepends=True))))


def faults(found: Account) -> tuple[int, int, int, int]:
    return found.lost, found.duplicate, found.misplaced, found.in_flight


def samples_of(*steps: int) -> int:
    return sum(len(planned(step)) for step in steps)


# What is written.


def test_the_files(run: Path) -> None:
    with closing(Ledger(run, 3, 12)) as ledger:
        ledger.write(7, 0, 4, [3, 5])
        assert of_rank(run, 3, 12).read_text() == '{"step":7,"epoch":0,"samples":4,"ids":[3,5]}\n'  # at once
        ledger.write(8, 1, 4, np.array([9]), [(np.int64(4), 'too "long"\n')])
        ledger.sync()
    second = json.loads(of_rank(run, 3, 12).read_text().splitlines()[1])
    assert second == {"step": 8, "epoch": 1, "samples": 4, "ids": [9], "skipped": [[4, 'too "long"\n']]}
    plan = json.loads((run / "samples" / "plan.json").read_text())
    assert plan == {"seed": SEED, "global_batch": BATCH, "samples": SAMPLES}
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "attempt_0003",
        "ids.safetensors",
        "plan.json",
    ]


def test_a_ledger_is_never_written_over(run: Path) -> None:
    attempt(run, 0, [2, 2])
    with pytest.raises(CheckpointError, match=r"rank_00001\.jsonl is there already\n.*Another process"):
        Ledger(run, 1, 1)
    assert len(of_rank(run, 1, 1).read_text().splitlines()) == 2


def test_a_disk_without_room_is_the_users_error(run: Path) -> None:
    # Python ignores the signal of the limit, so a write fails with an error, as on a full disk.
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom toolkit.checkpoint.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]), 1, 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "for step in range(1, 4): ledger.write(step, 0, 4, [1, 2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert "CheckpointError" in done.stderr
    assert "rank_00000.jsonl: cannot be written (File too large)" in done.stderr
    assert of_rank(run, 1, 0).stat().st_size == 100


# Histories in which nothing is lost.


def test_two_ranks_over_two_epochs(run: Path) -> None:
    attempt(run, 0, [12, 12], "finished")
    found = account(run)
    assert found.to_json() == {
        **{"lost": 0, "duplicate": 0, "misplaced": 0, "in_flight": 0, "samples": 44, "steps": 12, "epochs": 2},
        **{"lost_ids": [], "duplicate_ids": [], "misplaced_ids": [], "skipped": [], "sound": True},
        **{"attempts": 1, "ranks": [2]},
        "parts": [{"attempt": 1, "from_step": 0, "to_step": 12, "status": "finished", "ranks": 2, "ledgers": 2}],
    }


@pytest.mark.parametrize("last", range(1, 14))
def test_a_partial_epoch_is_held_against_its_plan(run: Path, last: int) -> None:
    attempt(run, 0, [last, last], "finished")
    found = account(run)
    assert found.sound
    assert (found.steps, found.epochs, found.samples) == (last, last // 6, samples_of(*range(1, last + 1)))


def test_what_a_later_attempt_undoes_does_not_count(run: Path) -> None:
    attempt(run, 0, [5, 5])
    attempt(run, 3, [9])
    attempt(run, 8, [14, 14, 14], "finished")
    found = account(run)
    assert faults(found) == (0, 0, 0, 0)
    assert found.samples == samples_of(*range(1, 15))
    assert [(part.from_step, part.to_step, part.ledgers) for part in found.parts] == [(0, 3, 2), (3, 8, 1), (8, 14, 3)]
    # A checkpoint turned out to be damaged, and the one before it is older than the last attempts.
    attempt(run, 2, [14, 14], "finished")
    found = account(run)
    assert faults(found) == (0, 0, 0, 0)
    assert [(part.from_step, part.to_step) for part in found.parts] == [(0, 2), (3, 3), (8, 8), (2, 14)]


def test_all_from_the_beginning_again(run: Path) -> None:
    attempt(run, 0, [4, 4])
    write_plan(run, SEED, BATCH, IDS)  # as each attempt from the beginning does
    attempt(run, 0, [7], "finished")
    assert account(run).samples == samples_of(*range(1, 8))
    attempt(run, 0, [])
    assert (account(run).steps, account(run).samples, account(run).sound) == (0, 0, True)


def test_killed_by_signal_nine_and_resumed_by_another_number_of_ranks(run: Path) -> None:
    attempts = Attempts(run)
    number = attempts.begin(0, ranks=2)
    with ExitStack() as stack:
        ranks = [stack.enter_context(start_rank(run, number, rank, 2, 1, 1_000_000)) for rank in range(2)]
        outputs = [process.stdout for process in ranks if process.stdout]
        for output in outputs:
            assert [output.readline() for _ in range(40)][-1] == "40\n"
        for process in ranks:
            process.kill()
        told = [max(map(int, ["40", *output.read().split()])) for output in outputs]
        assert [process.wait() for process in ranks] == [-signal.SIGKILL, -signal.SIGKILL]
    for rank in range(2):
        whole = [line for line in of_rank(run, number, rank).read_text().splitlines(keepends=True) if line[-1] == "\n"]
        assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
        assert len(whole) >= told[rank]
    attempt(run, 17, [31])
    attempt(run, 29, [44, 44, 44], "finished")
    found = account(run)
    assert faults(found) == (0, 0, 0, 0)
    assert [part.ranks for part in found.parts] == [2, 1, 3]
    assert (found.steps, found.samples) == (44, samples_of(*range(1, 45)))


@pytest.mark.parametrize("limit", [100, 270, 300, 333])
def test_killed_in_the_middle_of_a_line(run: Path, limit: int) -> None:
    attempts = Attempts(run)
    number = attempts.begin(0, ranks=2)
    with start_rank(run, number, 1, 2, 1, 1000, limit=limit) as process:
        process.communicate()
    assert process.returncode == -signal.SIGXFSZ
    content = of_rank(run, number, 1).read_bytes()
    assert len(content) == limit
    whole = content.count(b"\n")
    assert not content.endswith(b"\n")
    with closing(Ledger(run, number, 0)) as ledger:
        list(enter_steps(ledger, 0, 2, 1, whole + 1))
    found = account(run)
    missing = planned(whole + 1)[1::2]
    assert (faults(found), found.steps) == ((0, 0, 0, len(missing)), whole)
    attempt(run, whole, [12, 12], "finished")
    found = account(run)
    assert (faults(found), found.steps, found.samples) == ((0, 0, 0, 0), 12, 44)


def test_a_run_that_goes_on_while_it_is_read(run: Path) -> None:
    Attempts(run).begin(0, ranks=3)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.unit.test_ledger import enter_steps\n"
        "from toolkit.checkpoint.ledger import Ledger\n"
        "ranks = [enter_steps(Ledger(Path(sys.argv[1]), 1, rank), rank, 3, 1, 10**6) for rank in range(3)]\n"
        "for _ in zip(*ranks):\n    time.sleep(0.002)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=Path(__file__).parents[2])
    seen: list[int] = []
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (not seen or seen[-1] < 700):
            found = account(run)
            assert found.sound, faults(found)
            seen.append(found.steps)
    finally:
        process.kill()
        process.wait()
    assert seen[-1] >= 700
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_histories_drawn_by_lot(tmp_path: Path) -> None:
    for number in range(25):
        lot = random.Random(number)
        run = tmp_path / str(number)
        write_plan(run, SEED, BATCH, IDS)
        step = 0
        for _ in range(lot.randint(1, 5)):
            last, ranks = step + lot.randint(0, 9), lot.randint(1, 3)
            behind = [last - (last > step and lot.random() < 0.3) for _ in range(ranks)]
            attempt(run, step, behind)
            complete = min(behind)
            resume = lot.randint(0, complete)
            step = resume
        attempt(run, step, [step + 3] * lot.randint(1, 3), "finished")
        found = account(run)
        assert (faults(found), found.steps) == ((0, 0, 0, 0), step + 3), number
        assert found.samples == samples_of(*range(1, step + 4))
        # And whatever line that counts is taken away, its samples are missed.
        part = lot.choice([part for part in found.parts if part.to_step > part.from_step])
        away = lot.randint(part.from_step + 1, part.to_step)
        mine: list[int] = []

        def without(lines: list[str], away: int = away, mine: list[int] = mine) -> list[str]:
            mine += next(json.loads(line)["ids"] for line in lines if json.loads(line)["step"] == away)
            return [line for line in lines if json.loads(line)["step"] != away]

        change(of_rank(run, part.attempt, 0), without)
        found = account(run)
        assert sorted(found.lost_ids) == sorted(((away - 1) // PER_EPOCH, sample) for sample in mine), number
        assert faults(found) == (len(mine), 0, 0, 0)


# What is skipped, in flight, lost, seen twice, or in a wrong place.


def test_skipped_samples_are_no_loss(run: Path) -> None:
    Attempts(run).begin(0, ranks=1)
    with closing(Ledger(run, 1, 0)) as ledger:
        list(enter_steps(ledger, 0, 1, 1, 7))
        ids = planned(8)
        ledger.write(8, 1, 4, ids[1:], [(ids[0], "label 9 of 3")])
        ledger.write(9, 1, 4, [], [(sample, "the loss is nan") for sample in planned(9)])
        list(enter_steps(ledger, 0, 1, 10, 12))
    found = account(run)
    assert faults(found) == (0, 0, 0, 0)
    assert found.skipped == [(1, ids[0], "label 9 of 3"), *((1, sample, "the loss is nan") for sample in planned(9))]
    assert found.samples == 44 - 5
    # One that is skipped and seen all the same is seen twice.
    change(of_rank(run, 1, 0), lambda lines: [line.replace('"ids":[]', f'"ids":[{planned(9)[0]}]') for line in lines])
    assert account(run).duplicate_ids == [(1, planned(9)[0])]


def test_what_an_undone_step_skipped_does_not_count(run: Path) -> None:
    Attempts(run).begin(0, ranks=1)
    with closing(Ledger(run, 1, 0)) as ledger:
        list(enter_steps(ledger, 0, 1, 1, 3))
        ledger.write(4, 0, 4, [], [(sample, "spike") for sample in planned(4)])
    attempt(run, 3, [5], "finished")
    assert (account(run).sound, account(run).skipped) == (True, [])


@pytest.mark.parametrize("status", ["", "failed", "interrupted"])
def test_in_flight_is_what_the_last_step_of_all_lacks(run: Path, status: str) -> None:
    attempt(run, 0, [8, 7, 7], status)
    found = account(run)
    assert (faults(found), found.steps) == ((0, 0, 0, len(planned(8)) - len(planned(8)[0::3])), 7)
    assert found.sound


def test_a_rank_that_was_killed_before_its_first_step(run: Path) -> None:
    attempt(run, 0, [3, 3])
    attempt(run, 3, [4, 3])
    of_rank(run, 2, 1).unlink()
    found = account(run)
    assert (faults(found), found.steps) == ((0, 0, 0, len(planned(4)[1::2])), 3)


def test_ranks_cannot_be_two_steps_apart(run: Path) -> None:
    attempt(run, 0, [9, 7])
    found = account(run)
    assert faults(found) == (len(planned(8)[1::2] + planned(9)[1::2]), 0, 0, 0)


def test_nothing_is_in_flight_in_a_run_that_finished(run: Path) -> None:
    attempt(run, 0, [8, 7], "finished")
    assert account(run).lost_ids == [(1, sample) for sample in planned(8)[1::2]]


def test_nothing_is_in_flight_where_a_later_attempt_went_on_past_it(run: Path) -> None:
    attempt(run, 0, [8, 7])
    attempt(run, 8, [12], "finished")
    assert account(run).lost_ids == [(1, sample) for sample in planned(8)[1::2]]


def test_steps_that_no_rank_has_any_more(run: Path) -> None:
    attempt(run, 0, [8, 8], "finished")
    for rank in range(2):
        change(of_rank(run, 1, rank), lambda lines: lines[:-3])
    assert account(run).lost_ids == [(epoch, x) for epoch, step in ((0, 6), (1, 7), (1, 8)) for x in planned(step)]
    shutil.rmtree(run / "samples" / "attempt_0001")
    found = account(run)
    assert (found.lost, found.steps, found.parts[0].ledgers) == (samples_of(*range(1, 9)), 8, 0)


@pytest.mark.parametrize("status", ["", "finished"])
def test_a_missing_ledger_is_a_loss(run: Path, status: str) -> None:
    attempt(run, 0, [5, 5], status)
    of_rank(run, 1, 1).unlink()
    found = account(run)
    assert found.lost_ids == [(0, sample) for step in range(1, 6) for sample in planned(step)[1::2]]
    assert (found.parts[0].ledgers, found.parts[0].ranks) == (1, 2)


def test_steps_that_are_computed_again_without_going_back(run: Path) -> None:
    attempt(run, 0, [5, 5])
    attempt(run, 4, [7], "finished")
    change(run / "attempts.jsonl", lambda lines: [line.replace('"from_step": 4', '"from_step": 5') for line in lines])
    found = account(run)
    assert faults(found) == (0, 4, 0, 0)
    assert sorted(found.duplicate_ids) == sorted((0, sample) for sample in planned(5))


def test_one_sample_on_two_ranks(run: Path) -> None:
    attempt(run, 0, [5, 5], "finished")
    first, second = planned(3)[0], planned(3)[1]

    def swap(lines: list[str]) -> list[str]:
        return [line.replace(f"[{second},", f"[{first},") for line in lines]

    change(of_rank(run, 1, 1), swap)
    found = account(run)
    assert (found.lost_ids, found.duplicate_ids, found.misplaced) == ([(0, second)], [(0, first)], 0)


def test_a_sample_that_the_plan_does_not_know(run: Path) -> None:
    attempt(run, 0, [5, 5], "finished")
    change(of_rank(run, 1, 0), lambda lines: [line.replace(f"[{planned(2)[0]},", "[99,") for line in lines])
    found = account(run)
    assert (found.lost_ids, found.duplicate, found.misplaced_ids) == ([(0, planned(2)[0])], 0, [(0, 99)])


@pytest.mark.parametrize("last", [4, 6])
def test_samples_out_of_their_order(run: Path, last: int) -> None:
    attempt(run, 0, [last], "finished")

    def swap(lines: list[str]) -> list[str]:
        records = [json.loads(line) for line in lines]
        records[1]["ids"], records[2]["ids"] = records[2]["ids"], records[1]["ids"]
        return [json.dumps(record) + "\n" for record in records]

    change(of_rank(run, 1, 0), swap)
    found = account(run)
    assert faults(found) == (0, 0, 8, 0)
    assert not found.sound
    assert set(found.misplaced_ids) == {(0, sample) for sample in planned(2) + planned(3)}


def test_a_sample_before_its_turn(run: Path) -> None:
    attempt(run, 0, [2], "finished")
    later = planned(5)[0]
    change(of_rank(run, 1, 0), lambda lines: [line.replace("]", f",{later}]") for line in lines[:1]] + lines[1:])
    assert account(run).misplaced_ids == [(0, later)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"step":3,"epoch":0,"samp', "it is not a JSON object"),
        ("3", "it is not a JSON object"),
        ('{"step":3,"epoch":0,"samples":4}', "it is no step of this run"),
        ('{"step":3,"epoch":1,"samples":4,"ids":[]}', "it is no step of this run"),
        ('{"step":0,"epoch":-1,"samples":4,"ids":[]}', "it is no step of this run"),
        ('{"step":"3","epoch":0,"samples":4,"ids":[]}', "it is no step of this run"),
        ('{"step":3,"epoch":0,"samples":4,"ids":[1.5]}', "it is no step of this run"),
        ('{"step":3,"epoch":0,"samples":4,"ids":["7"]}', "it is no step of this run"),
        ('{"step":3,"epoch":0,"samples":4,"ids":[9223372036854775808]}', "it is no step of this run"),
        ('{"step":3,"epoch":0,"samples":4,"ids":[],"skipped":[1]}', "it is no step of this run"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(run: Path, line: str, why: str) -> None:
    attempt(run, 0, [5, 5])
    change(of_rank(run, 1, 1), lambda lines: [*lines[:2], line + "\n", *lines[3:]])
    with pytest.raises(CheckpointError, match=rf"attempt_0001/rank_00001\.jsonl, line 3: {why}"):
        account(run)


def test_what_is_no_run_or_has_no_plan(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no attempts\.jsonl"):
        account(run)
    attempt(run, 0, [5, 5])
    plan, ids = run / "samples" / "plan.json", run / "samples" / "ids.safetensors"
    for damage in (b"", b'{"seed": 5}', b'{"seed": 5, "global_batch": 4, "samples": 23}', b"\xff"):
        plan.write_bytes(damage)
        with pytest.raises(CheckpointError, match="are not the plan of one run"):
            account(run)
    write_plan(run, SEED, BATCH, IDS)
    ids.write_bytes(ids.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="are not the plan of one run"):
        account(run)
    ids.unlink()
    with pytest.raises(CheckpointError, match=r"ids\.safetensors: cannot be read \(No such file"):
        account(run)
    write_plan(run, SEED, BATCH, [*IDS[:-1], IDS[0]])
    with pytest.raises(CheckpointError, match="in which each sample has its own id"):
        account(run)


def test_many_faults_are_all_counted_and_the_first_thousand_named(tmp_path: Path) -> None:
    samples, batch = 6000, 1000
    write_plan(tmp_path, SEED, batch, range(samples))
    Attempts(tmp_path).begin(0, ranks=1)
    order = epoch_order(SEED, 0, samples).tolist()
    with closing(Ledger(tmp_path, 1, 0)) as ledger:
        for step in (1, 2, 3, 2, 3, 6):
            ledger.write(step, 0, batch, order[(step - 1) * batch : step * batch])
    found = account(tmp_path)
    assert faults(found) == (2000, 2000, 0, 0)
    assert found.lost_ids == [(0, row) for row in order[3000:4000]]
    assert len(found.duplicate_ids) == 1000


# The command.


def command(*words: object) -> int:
    parser = ArgumentParser()
    samples_command.add_arguments(parser)
    return samples_command.run(parser.parse_args(list(map(str, words))))


def test_the_command_shows_the_account(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(run, 0, [5, 5])
    attempt(run, 3, [12], "finished")
    assert command(run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "0", "3", "2", "killed"] in lines
    assert ["2", "3", "12", "1", "finished"] in lines
    assert ["lost", "0"] in lines
    assert ["12", "steps,", "2", "whole", "epochs:", "44", "samples", "were", "computed"] in lines
    of_rank(run, 1, 1).unlink()
    assert command(run) == 1
    out = capsys.readouterr().out
    lost = [sample for step in range(1, 4) for sample in planned(step)[1::2]]
    assert f"lost       6: {', '.join(f'{sample} (epoch 0)' for sample in lost)}\n" in out
    assert "1 of 2" in out


def test_a_reason_cannot_steer_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Attempts(run).begin(0, ranks=1)
    with closing(Ledger(run, 1, 0)) as ledger:
        ledger.write(1, 0, 4, [], [(sample, "bad \x1b[2J[red]row") for sample in planned(1)])
    assert command(run) == 0
    out = capsys.readouterr().out
    assert f"skipped    4: {planned(1)[0]} (epoch 0: bad �[2J[red]row), " in out


def test_the_command_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(run, 0, [5, 4])
    assert command(run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(account(run).to_json()))
    assert (found["lost"], found["duplicate"], found["in_flight"], found["ranks"]) == (0, 0, 2, [2])
    attempt(run, 5, [6], "finished")
    assert command(run, "--json") == 1
    assert json.loads(capsys.readouterr().out)["lost_ids"] == [[0, sample] for sample in planned(5)[1::2]]


def test_the_command_does_not_wait_for_torch() -> None:
    code = "import sys, toolkit.checkpoint.samples_command; print(*({'torch', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
