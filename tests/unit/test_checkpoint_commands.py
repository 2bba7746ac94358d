"""The commands on checkpoints: what they find, what they write, and what they refuse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from tests.ranks import on_ranks
from tests.unit.checkpoint_runs import write_run
from toolkit.checkpoint.commands import COMMANDS
from toolkit.checkpoint.manifest import read_manifest, write_manifest
from toolkit.checkpoint.store import Store
from toolkit.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(write_run, 1, folder / "single", "single")
    on_ranks(write_run, 2, folder / "sharded", "fsdp", "classifier", (30,))
    return {name: folder / name for name in ("single", "sharded")}


@pytest.fixture
def run(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 (the best) and 30."""
    return Path(shutil.copytree(originals["single"], tmp_path / "run"))


Toolkit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def toolkit(capsys: pytest.CaptureFixture[str]) -> Toolkit:
    """Run `toolkit checkpoint …` in this process; exit code, standard output, and standard error on one line."""

    def run_command(*words: object) -> tuple[int, str, str]:
        code = main(["checkpoint", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, " ".join(" ".join(line.strip("│╭╮╰╯─ ") for line in err.splitlines()).split())

    return run_command


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def flip(folder: Path) -> None:
    """One bit in the middle of the tensors: no size changes, and the file can be read."""
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def rewrite(folder: Path, **changes: Any) -> None:
    """A manifest made by hand, whose digest is right."""
    body = {key: value for key, value in (read_manifest(folder) | changes).items() if value is not None}
    for name in ("manifest.json", "manifest.json.sha256"):
        (folder / name).unlink()
    write_manifest(folder, body)


# ls


def test_ls(run: Path, toolkit: Toolkit) -> None:
    code, out, err = toolkit("ls", run)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert list(rows) == ["30", "20", "10"]
    assert rows["30"][1].startswith("2030-05-0")
    assert rows["30"][5:] == ["single,", "1", "rank,", "fp32", "good", "0.0333", "0.7000", "newest"]
    assert rows["20"][5:] == ["single,", "1", "rank,", "fp32", "good", "0.0500", "0.5000", "best"]
    assert rows["10"][-1] == "0.9000"
    assert rows["30"][3:5] == ["323.5", "kB"]


def test_ls_as_json(run: Path, originals: dict[str, Path], toolkit: Toolkit) -> None:
    code, out, _ = toolkit("ls", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert [(c["step"], c["state"], c["newest"], c["best"]) for c in found["checkpoints"]] == [
        (30, "good", True, False),
        (20, "good", False, True),
        (10, "good", False, False),
    ]
    first = found["checkpoints"][0]
    assert first["metrics"] == {"loss": pytest.approx(1 / 30), "validation_loss": 0.7}
    assert first["bytes"] == sum(path.stat().st_size for path in step(run, 30).iterdir())
    assert (found["unfinished"], found["quarantine"]) == ([], [])
    sharded = json.loads(toolkit("ls", originals["sharded"], "--json")[1])["checkpoints"]
    assert [c["world"] for c in sharded] == [{"ranks": 2, "strategy": "fsdp", "precision": "fp32", "device": "cpu"}]


def test_ls_tells_what_is_not_good(run: Path, toolkit: Toolkit) -> None:
    cut(step(run, 30))
    flip(step(run, 20))
    store = Store(run)
    store.quarantine(step(run, 10), "one bit was flipped")
    store.begin(store.aside(40, 2))
    (store.aside(40, 2) / "shard_00001.safetensors").write_bytes(b"x" * 2000)
    code, out, _ = toolkit("ls", run)
    assert code == 0
    assert [line.split()[9] for line in out.splitlines()[2:4]] == ["corrupt", "good"]  # a flipped bit has no size
    assert "checkpoints/step_00000030 (corrupt, 323.5 kB): shard_00001.safetensors has" in out
    assert ".writing_step_00000040_attempt_0002 (partial, 2.0 kB): a save that goes on, or was cut short" in out
    assert "(corrupt, 323.5 kB): one bit was flipped" in out
    found = json.loads(toolkit("ls", run, "--json", "--deep")[1])
    assert [c["state"] for c in found["checkpoints"]] == ["corrupt", "corrupt"]
    assert "shard_00001.safetensors is not the file that was written" in found["checkpoints"][1]["reason"]
    assert [c["step"] for c in found["unfinished"] + found["quarantine"]] == [40, 10]


def test_ls_of_a_save_that_a_start_has_found_unfinished(run: Path, toolkit: Toolkit) -> None:
    store = Store(run)
    store.begin(store.aside(40, 2))
    store.clean()
    found = json.loads(toolkit("ls", run, "--json")[1])
    assert [(c["step"], c["state"], c["reason"]) for c in found["quarantine"]] == [
        (40, "partial", "a save that was not finished")
    ]


def test_ls_where_the_pointer_leads_nowhere(run: Path, toolkit: Toolkit) -> None:
    shutil.rmtree(step(run, 30))
    _, out, _ = toolkit("ls", run)
    assert "the one that was committed last, of step 30, is not the newest here" in out
    (run / "checkpoints" / "latest.json").write_text("{")
    assert "committed last" not in toolkit("ls", run)[1]


def test_ls_of_a_run_without_checkpoints(tmp_path: Path, toolkit: Toolkit) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert toolkit("ls", tmp_path) == (0, "no checkpoint\n", "")


def test_control_codes_do_not_reach_the_screen(run: Path, toolkit: Toolkit) -> None:
    rewrite(step(run, 30), world={"strategy": "\x1b[31mred", "ranks": 1, "precision": "fp32"})
    _, out, _ = toolkit("ls", run)
    assert "\x1b" not in out
    assert "�[31mred" in out


def test_a_listing_does_not_wait_for_torch(run: Path) -> None:
    script = (
        "import sys\nfrom toolkit.cli import main\n"
        "for words in (['ls', sys.argv[1]], ['verify', sys.argv[1]], ['rm', sys.argv[1], '--step', '10', '--yes']):\n"
        "    assert main(['checkpoint', *words]) == 0\n"
        "print('slow:', *({'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, run], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.endswith("slow:\n")


# verify


def test_verify(run: Path, toolkit: Toolkit) -> None:
    code, out, err = toolkit("verify", run)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["step", str(number), "good", "323.5", "kB"] for number in (30, 20, 10)
    ]
    flip(step(run, 20))
    code, out, _ = toolkit("verify", run)
    assert code == 1
    assert [line.split()[2] for line in out.splitlines()] == ["good", "corrupt", "good"]
    assert "shard_00001.safetensors is not the file that was written (SHA-256)" in out
    assert toolkit("verify", run, "--step", 30)[0] == 0
    assert toolkit("verify", run, "--step", 20)[0] == 1
    code, out, _ = toolkit("verify", step(run, 20), "--json")
    assert (code, json.loads(out)["good"]) == (1, False)


def test_every_byte_counts(run: Path, toolkit: Toolkit) -> None:
    """Any file, the manifest and its digest included; missing and added ones."""
    good = step(run, 20)
    names = [path.name for path in good.iterdir()]
    assert len(names) == 4
    for name in names:
        content = (good / name).read_bytes()
        for changed in (content[:-1], content[:7] + bytes([content[7] ^ 1]) + content[8:], b""):
            (good / name).write_bytes(changed)
            assert toolkit("verify", run, "--step", 20)[0] == 1, name
        (good / name).unlink()
        assert toolkit("verify", run, "--step", 20)[0] == 1, name
        (good / name).symlink_to(shutil.copy(step(run, 30) / name, run.parent))
        assert toolkit("verify", run, "--step", 20)[0] == 1, name
        (good / name).unlink()
        os.mkfifo(good / name)
        assert toolkit("verify", run, "--step", 20)[0] == 1, name
        (good / name).unlink()
        (good / name).write_bytes(content)
    assert toolkit("verify", run, "--step", 20)[0] == 0
    (good / "more.json").write_text("{}")
    assert "more.json does not belong there" in toolkit("verify", run, "--step", 20)[1]


def test_verify_tells_a_digest_of_the_state(run: Path, toolkit: Toolkit) -> None:
    flip(step(run, 10))
    code, out, _ = toolkit("verify", run, "--digest", "--json")
    found = {c["step"]: c["digest"] for c in json.loads(out)["checkpoints"]}
    assert code == 1
    assert found[10] is None
    assert len(found[30]) == 64
    assert found[30] != found[20]
    assert found[30] in toolkit("verify", run, "--digest")[1]


def test_right_hashes_of_wrong_tensors(run: Path, toolkit: Toolkit) -> None:
    folder = step(run, 30)
    tensors = read_manifest(folder)["tensors"]
    rewrite(folder, tensors=tensors | {"weights/more": {"shape": [2], "dtype": "float32"}})
    code, out, _ = toolkit("verify", run, "--digest", "--step", 30)
    assert code == 1
    assert "manifest and files do not name the same tensors (weights/more)" in out


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": []},
        {"files": {"../../config.yaml": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"files": {"..": {"bytes": 1, "sha256": "0"}}},
        {"files": {"rank_00000.json": {"bytes": "many"}}},
        {"tensors": {"weights/x": {"shape": [-1], "dtype": "float32"}}},
        {"tensors": {"weights/x": {"shape": "large", "dtype": "float32"}}},
        {"tensors": None},
        {"world": "wide"},
        {"metrics": None},
        {"step": "thirty"},
        {"step": True},
        {"step": 31},
        {"step": None},
        {"format": 99},
    ],
)
def test_manifests_made_by_hand(run: Path, toolkit: Toolkit, changes: dict[str, Any]) -> None:
    rewrite(step(run, 30), **changes)
    for command in ("ls", "verify"):
        code, out, err = toolkit(command, run)
        assert code == (command == "verify")
        assert "corrupt" in out
        assert err == ""
    code, _, err = toolkit("export", run, run / "model")
    assert code == 2
    assert "step_00000030isdamaged:manifest.json" in "".join(err.split()), "wherever its lines end"
    assert "Take another with --step: 20, 10." in err


def test_a_folder_that_is_a_link(run: Path, toolkit: Toolkit) -> None:
    shutil.move(step(run, 30), run / "elsewhere")
    step(run, 30).symlink_to(run / "elsewhere")
    assert "step       30  corrupt" in toolkit("verify", run)[1]


# export


def test_export(run: Path, toolkit: Toolkit) -> None:
    target = run / "exported"
    code, out, err = toolkit("export", run, target, "--max-shard-size", "50KB")
    assert (code, out) == (0, f"{target}\n")
    assert err.startswith("step 30: 22,563 parameters in 41 tensors and 2 files (")
    assert "weights differ by at most 0 and its logits by 0 (bound 1e-05)" in err
    weights = BertForSequenceClassification.from_pretrained(target).state_dict()
    stored = load_file(next(step(run, 30).glob("*.safetensors")))
    assert all(torch.equal(tensor.flatten(), stored[f"weights/{name}"]) for name, tensor in weights.items())


def test_which_step_is_exported(run: Path, toolkit: Toolkit) -> None:
    for number, words in (
        (30, [run]),
        (30, [run, "--step", "latest"]),
        (20, [run, "--step", "best"]),
        (10, [run, "--step", "10"]),
        (20, [step(run, 20)]),
    ):
        target = run / "exported"
        code, _, err = toolkit("export", words[0], target, *words[1:])
        assert code == 0
        assert err.startswith(f"step {number}: ")
        stored = load_file(next(step(run, number).glob("*.safetensors")))["weights/classifier.bias"]
        assert torch.equal(load_file(target / "model.safetensors")["classifier.bias"], stored)
        shutil.rmtree(target)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_tampered_checkpoint_is_not_exported(run: Path, toolkit: Toolkit, damage: Callable[[Path], None]) -> None:
    damage(step(run, 30))
    code, out, err = toolkit("export", run, run / "exported")
    assert (code, out) == (2, "")
    assert "step_00000030isdamaged:shard_00001.safetensors" in "".join(err.split()), "wherever its lines end"
    assert "Take another with --step: 20, 10." in err
    assert not (run / "exported").exists()
    assert toolkit("export", run, run / "exported", "--step", 20)[0] == 0


def test_an_export_that_is_not_proved(run: Path, toolkit: Toolkit) -> None:
    """A configuration that cannot be built, and one of another model."""
    base = run / "base" / "config.json"
    config = json.loads(base.read_text())
    base.write_text(json.dumps(config | {"num_labels": 4, "id2label": {str(i): str(i) for i in range(4)}}))
    code, out, err = toolkit("export", run, run / "exported")
    assert (code, out) == (2, "")
    assert "the weights are not those of the BertForSequenceClassification" in err
    base.write_text(json.dumps(config | {"architectures": ["Evil"]}))
    assert "'Evil', which is no model of transformers" in toolkit("export", run, run / "exported")[2]
    shutil.rmtree(run / "base")
    assert "base is missing" in toolkit("export", run, run / "exported")[2]
    assert not (run / "exported").exists()


def test_nothing_but_the_folder_is_printed(run: Path) -> None:
    """In a process of its own: libraries that are imported print, too."""
    words = [sys.executable, "-m", "toolkit.cli", "checkpoint", "export", run, run / "exported"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT, env=environment)
    assert done.stdout == f"{run / 'exported'}\n"
    assert len(done.stderr.splitlines()) == 1


# convert


def test_convert(originals: dict[str, Path], run: Path, tmp_path: Path, toolkit: Toolkit) -> None:
    """One file for each kind, in the original shapes, from one rank or two."""
    for source, folder in ((run, step(run, 30)), (originals["sharded"], step(originals["sharded"], 30))):
        target = tmp_path / f"of {source.name}"
        code, out, err = toolkit("convert", source, target)
        assert (code, out) == (0, f"{target}\n")
        assert "exp_avg_sq.safetensors: 41 tensors" in err
        kinds = {path.stem: load_file(path) for path in target.glob("*.safetensors")}
        assert kinds.keys() == {"weights", "exp_avg", "exp_avg_sq", "step"}
        manifest = read_manifest(folder)
        assert {f"{kind}/{name}" for kind in kinds for name in kinds[kind]} == manifest["tensors"].keys()
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                assert list(tensor.shape) == manifest["tensors"][f"{kind}/{name}"]["shape"]
                parts = [load_file(path).get(f"{kind}/{name}") for path in sorted(folder.glob("*.safetensors"))]
                stored = torch.cat([part for part in parts if part is not None])
                assert torch.equal(tensor.flatten(), stored)
        assert kinds["exp_avg"]["classifier.weight"].shape == (3, 32)
        assert float(kinds["step"]["classifier.weight"]) == (3 if source == run else 1)
        assert bool(kinds["exp_avg_sq"]["classifier.weight"].any())
        state = json.loads((target / "state.json").read_text())
        assert (state["step"], state["world"], state["metrics"]) == (30, manifest["world"], manifest["metrics"])


def test_convert_one_step(run: Path, tmp_path: Path, toolkit: Toolkit) -> None:
    assert toolkit("convert", run, tmp_path / "of run", "--step", 10)[0] == 0
    copy = shutil.copytree(step(run, 10), tmp_path / "copy under another name")
    assert toolkit("convert", copy, tmp_path / "of copy")[0] == 0
    for name in ("weights.safetensors", "state.json"):
        assert (tmp_path / "of run" / name).read_bytes() == (tmp_path / "of copy" / name).read_bytes()
    flip(step(run, 10))
    code, _, err = toolkit("convert", run, tmp_path / "damaged", "--step", 10)
    assert code == 2
    assert "is damaged" in err
    assert not (tmp_path / "damaged").exists()


# rm


def test_rm(run: Path, toolkit: Toolkit) -> None:
    code, out, _ = toolkit("rm", run, "--step", 30, "--step", 10, "--yes")
    assert code == 0
    assert [line.split()[1].rsplit("/")[-1] for line in out.splitlines()] == ["step_00000010", "step_00000030"]
    assert [number for number, _ in Store(run).committed()] == [20]
    assert Store(run).pointer() == 20  # or the next start would speak of a loss
    assert toolkit("rm", run, "--step", 20, "--yes")[0] == 0
    assert Store(run).pointer() is None
    assert [path.name for path in (run / "checkpoints").iterdir()] == []


def test_rm_of_what_is_in_quarantine(run: Path, toolkit: Toolkit) -> None:
    store = Store(run)
    store.quarantine(step(run, 10), "one bit was flipped")
    store.quarantine(step(run, 20), "another one")
    code, out, _ = toolkit("rm", run, "--quarantine", "--yes")
    assert (code, out.count("removed ")) == (0, 2)
    assert [path.name for path in (run / "checkpoints" / "quarantine").iterdir()] == []
    assert [number for number, _ in store.committed()] == [30]
    assert toolkit("rm", run, "--quarantine", "--yes") == (0, "nothing is in quarantine\n", "")


def test_rm_while_a_process_writes(run: Path, toolkit: Toolkit) -> None:
    with FileLock(run / ".lock"):
        code, _, err = toolkit("rm", run, "--step", 10, "--yes")
    assert code == 2
    assert "a process is writing to" in err
    assert step(run, 10).exists()
    assert toolkit("rm", run, "--step", 10, "--yes")[0] == 0


def on_terminal(answer: bytes, *words: object) -> tuple[int, str]:
    """Run the command with a terminal as its standard input; exit code, and all that it printed."""
    terminal, side = os.openpty()
    os.write(terminal, answer)
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", "checkpoint", *map(str, words)],
        stdin=side,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    os.close(terminal)
    os.close(side)
    return done.returncode, done.stdout


def test_rm_asks_on_a_terminal(run: Path) -> None:
    for answer in (b"n\n", b"\n", b"\x04"):
        code, out = on_terminal(answer, "rm", run, "--step", 10)
        assert code == 1
        assert f"{step(run, 10)} (323.5 kB)\nremove for good? [y/N] " in out
        assert out.endswith("nothing was removed\n")
        assert step(run, 10).exists()
    code, out = on_terminal(b"y\n", "rm", run, "--step", 10)
    assert code == 0
    assert not step(run, 10).exists()


def test_rm_keeps_the_last_good_one(run: Path, toolkit: Toolkit) -> None:
    """A flipped bit in the one that would be left, which no size tells."""
    flip(step(run, 20))
    code, out = on_terminal(b"y\n", "rm", run, "--step", 10, "--step", 30)
    assert code == 2
    assert "would have no good checkpoint any more" in " ".join(out.replace("│", " ").split())
    assert len(Store(run).committed()) == 3
    assert on_terminal(b"y\n", "rm", run, "--step", 20, "--step", 30)[0] == 0
    assert [number for number, _ in Store(run).committed()] == [10]
    assert on_terminal(b"y\n", "rm", run, "--step", 10)[0] == 2
    assert toolkit("rm", run, "--step", 10, "--yes")[0] == 0


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls"], "the following arguments are required: RUN"),
        (["ls", "RUNN"], "is not there. Did you mean 'run'?"),
        (["ls", "RUN/config.yaml"], "is a file, not a folder"),
        (
            ["ls", "RUN/.."],
            "is no run: it has neither checkpoints/ nor config.yaml → Name one of the runs in it: empty, run.",
        ),
        (["ls", "RUN/checkpoints"], "→ Name the folder of the run:"),
        (["ls", "RUN/checkpoints/step_00000010"], "→ Name the folder of the run:"),
        (["ls", "RUN", "--jsn"], "Did you mean '--json'?"),
        (["lss", "RUN"], "there is no command 'lss'. Did you mean 'ls'? → Commands: ls, verify,"),
        (["verify", "RUN", "--step", "11"], "there is no checkpoint of step 11 in"),
        (["verify", "RUN", "--step", "last"], "'last' is not a whole number from 0 on"),
        (["verify", "RUN/checkpoints/step_00000010", "--step", "10"], "--step 10 has no effect"),
        (["verify", "EMPTY"], "has no checkpoint to verify"),
        (["export", "RUN"], "the following arguments are required: TARGET"),
        (["export", "RUN", "RUN"], "is there already, and is not an empty folder"),
        (["export", "RUN", "RUN/config.yaml"], "is there already, and is not an empty folder"),
        (["export", "RUN", "RUN/no/where"], "there is no folder"),
        (["export", "RUN", "RUN/checkpoints/x"], "is inside of a folder of checkpoints"),
        (["export", "RUN", "RUN/checkpoints/step_00000030/x"], "is inside of a folder of checkpoints"),
        (["export", "RUN", "RUN/x", "--step", "worst"], "'worst' is neither a whole number nor best nor latest"),
        (["export", "RUN", "RUN/x", "--step", "11"], "Steps there: 30, 20, 10."),
        (["export", "RUN", "RUN/x", "--max-shard-size", "5"], "'5' is no size like 500MB or 5GB"),
        (["export", "RUN", "RUN/x", "--bound", "-1"], "'-1' is not a number from 0 on"),
        (["export", "RUN", "RUN/x", "--bound", "nan"], "'nan' is not a number from 0 on"),
        (["export", "EMPTY", "RUN/x"], "has no checkpoint to export"),
        (["export", "EMPTY", "RUN/x", "--step", "best"], "has no checkpoint to export"),
        (["convert", "RUN/base", "RUN/x"], "it has no manifest that says what is to be in it → If another tool"),
        (["convert", "RUN/nowhere", "RUN/x"], "is not there"),
        (["convert", "RUN", "RUN/base"], "is there already"),
        (["convert", "RUN", "RUN/x", "--foreign"], "is one of ours → Drop --foreign"),
        (["convert", "RUN/checkpoints/step_00000010", "RUN/x", "--foreign"], "is one of ours"),
        (["convert", "RUN/base", "RUN/x", "--foreign"], "holds neither .metadata"),
        (["convert", "RUN/base", "RUN/x", "--foreign", "--step", "3"], "--step 3 has no effect"),
        (["convert", "RUN/nowhere", "RUN/x", "--foreign"], "there is no folder"),
        (["rm", "RUN"], "there is nothing to remove"),
        (["rm", "RUN", "--step", "11", "--yes"], "there is no checkpoint of step 11"),
        (["rm", "RUN", "--step", "10"], "as there is no terminal → Add --yes."),
    ],
)
def test_mistakes(run: Path, toolkit: Toolkit, words: list[str], message: str) -> None:
    (run.parent / "empty").mkdir()
    (run.parent / "empty" / "config.yaml").write_text("{}")
    before = hashlib.sha256(repr(sorted(map(str, run.parent.rglob("*")))).encode()).digest()
    code, out, err = toolkit(*(word.replace("RUN", str(run)).replace("EMPTY", f"{run.parent}/empty") for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    (run / ".lock").unlink(missing_ok=True)
    assert hashlib.sha256(repr(sorted(map(str, run.parent.rglob("*")))).encode()).digest() == before


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, toolkit: Toolkit) -> None:
    code, out, _ = toolkit(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: toolkit checkpoint {name} ")
    assert "--debug" in out


def test_help_lists_the_commands(toolkit: Toolkit, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = toolkit("--help")
    assert code == 0
    for name, (summary, *_) in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in out.splitlines())
    assert toolkit()[0] == 2


def test_debug_shows_the_traceback(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.cli", "checkpoint", "ls", run.parent / "nowhere", "--debug"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert io.StringIO(done.stderr).readlines()[-2].startswith("toolkit.errors.CheckpointError: the run")
