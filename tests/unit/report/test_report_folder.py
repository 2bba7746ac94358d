"""The run folder: what is written comes back, a kill leaves no half file, and no secret is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toolkit.errors import CheckpointError
from toolkit.report import RunFolder, build_manifest, redact
from toolkit.report.folder import REDACTED, redact_command

CANARY = "cAnArY7f3kQ9zX2mP"
WORLD = {"ranks": 2, "nodes": 1, "device": "cpu", "backend": "gloo"}


def manifest(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "argv": ["recipes/classify_text.py", "--train.epochs", "2"],
        "seed": 3,
        "data_fingerprint": "sha256:ab12",
        "requested": {"precision": "auto"},
        "effective": {"precision": "bf16"},
        "world": WORLD,
    }
    return build_manifest(**{**arguments, **changes})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "新闻" / "1")
    config = "# kept to the letter\nmodel:\n  name: 'sample:minilm'\n"
    run.write_config(config)
    run.write_manifest({"versions": {"torch": "2"}})
    run.write_report({"labels": ["体育", "tech"], "test": {"accuracy": np.float32(0.5), "confusion": np.eye(2)}})
    run.append_metrics([{"step": 1, "loss": torch.tensor(0.25)}])
    assert run.read_config() == config
    assert run.read_manifest() == {"versions": {"torch": "2"}}
    assert run.read_report() == {
        "labels": ["体育", "tech"],
        "test": {"accuracy": 0.5, "confusion": [[1.0, 0.0], [0.0, 1.0]]},
    }
    assert run.read_metrics() == [{"step": 1, "loss": 0.25}]
    assert "体育" in run.report_path.read_text(encoding="utf-8")
    assert sorted(path.name for path in run.path.iterdir()) == [
        *("config.yaml", "manifest.json", "metrics.jsonl", "report.json"),
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    bad = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), torch.tensor(float("inf")), np.array([np.nan])]
    run.append_metrics([{"step": i, "loss": value} for i, value in enumerate(bad)])
    run.write_report({"test": {"loss": float("nan")}})
    for path in (run.metrics_path, run.report_path):
        assert "nan" not in path.read_text().lower()
        assert "inf" not in path.read_text().lower()
    assert [line["loss"] for line in run.read_metrics()] == [None, None, None, None, None, [None]]


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_report({"run": os.fsdecode(b"runs/\xff")})
    assert run.read_report() == {"run": "runs/\\udcff"}


def test_a_last_line_cut_short_is_dropped_and_written_over(tmp_path: Path) -> None:
    whole = RunFolder(tmp_path / "whole")
    lines = [{"step": 1, "note": "体育"}, {"step": 2, "note": "体育"}]
    whole.append_metrics(lines)
    content = whole.metrics_path.read_bytes()
    first = content.index(b"\n") + 1
    cuts = range(first, len(content) + 1)
    assert len(cuts) > 10
    for cut in cuts:
        run = RunFolder(tmp_path / f"cut-{cut}")
        run.path.mkdir()
        run.metrics_path.write_bytes(content[:cut])
        survivors = lines if cut >= len(content) - 1 else lines[:1]
        assert run.read_metrics() == survivors
        run.append_metrics([{"step": 3}])
        assert run.read_metrics() == [*survivors, {"step": 3}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        run.read_metrics()


def test_truncate_metrics_drops_what_a_resumed_run_will_do_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.truncate_metrics(3)
    assert not run.metrics_path.exists()
    run.append_metrics([{"step": step, "loss": 0.1 * step} for step in range(1, 8)])
    before = run.read_metrics()
    run.truncate_metrics(4)
    assert run.read_metrics() == before[:4]


@pytest.mark.parametrize("part", ["config", "manifest", "metrics", "report"])
def test_a_missing_file_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(CheckpointError, match=part) as caught:
        getattr(RunFolder(tmp_path), f"read_{part}")()
    assert "folder of a run" in caught.value.remedy


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.report_path.write_text('{"status": "fin')
    run.manifest_path.write_text("[1]")
    run.config_path.write_bytes(b"model: \xff\xfe")
    for read in (run.read_report, run.read_manifest, run.read_config):
        with pytest.raises(CheckpointError, match=r"report\.json|manifest\.json|config\.yaml"):
            read()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.report_path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.write_report({"status": "finished"})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom toolkit.report import RunFolder\nrun = RunFolder(sys.argv[1])\n"
        "for step in range(10**9):\n"
        "    run.write_report({'steps': step, 'filling': list(range(4000))})\n"
        "    run.append_metrics([{'step': step, 'filling': 'x' * 4000}])\n"
    )
    run = RunFolder(tmp_path)
    for kill in range(4):
        writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        try:
            wait_for(lambda: run.report_path.exists() and run.metrics_path.exists())
            time.sleep(0.05 + 0.013 * kill)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert len(run.read_report()["filling"]) == 4000
        assert all(len(line["filling"]) == 4000 for line in run.read_metrics())


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_manifest_says_how_the_run_came_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SOME_PRIVATE_THING", "x")
    monkeypatch.setenv("ACCELERATE_TOKEN", "x")
    made = manifest()
    assert made["command"] == "recipes/classify_text.py --train.epochs 2"
    assert made["seed"] == 3
    assert made["world"] == WORLD
    assert (made["requested"], made["effective"]) == ({"precision": "auto"}, {"precision": "bf16"})
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert made["hardware"]["cores"] == os.cpu_count()
    assert made["hardware"]["cpu"]
    assert len(made["hardware"]["gpus"]) == torch.cuda.device_count()
    assert made["started"].endswith("+00:00")
    assert made["environment"]["FSDP_VERSION"] == "2"
    assert made["environment"]["SLURM_JOB_ID"] == "77"
    assert not {"SOME_PRIVATE_THING", "ACCELERATE_TOKEN"} & set(made["environment"])
    run = RunFolder(tmp_path)
    run.write_manifest(made)
    assert run.read_manifest() == made


def test_the_manifest_names_commit_and_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest()["git"] is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "recipe.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "recipe.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert manifest()["git"] == {"commit": head, "dirty": False}
    (tmp_path / "recipe.py").write_text("2\n")
    assert manifest()["git"] == {"commit": head, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest()["git"] is None


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--hub.token", CANARY], ["--hub.token", REDACTED]),
        (["--hub.token=" + CANARY], ["--hub.token=" + REDACTED]),
        (["-token", CANARY, "--x", "1"], ["-token", REDACTED, "--x", "1"]),
        (["--api_keys", CANARY, CANARY, "--x"], ["--api_keys", REDACTED, REDACTED, "--x"]),
        (["--db.password", "1234"], ["--db.password", REDACTED]),
        (["--accessKey", CANARY], ["--accessKey", REDACTED]),
        (["--client-secret", "a=" + CANARY], ["--client-secret", REDACTED]),
        (["HF_TOKEN=" + CANARY, "x.py"], ["HF_TOKEN=" + REDACTED, "x.py"]),
        (["--note", "hf_" + CANARY], ["--note", REDACTED]),
        (["--note=see sk-" + CANARY], ["--note=see " + REDACTED]),
        (["ghp_" + CANARY], [REDACTED]),
        (["--header", "Authorization: Bearer " + CANARY], ["--header", f"Authorization: Bearer {REDACTED}"]),
        (["https://me:" + CANARY + "@host/x"], [f"https://me:{REDACTED}@host/x"]),
        (["https://host/x?a=1&token=" + CANARY + "&b=2"], [f"https://host/x?a=1&token={REDACTED}&b=2"]),
        (['--json={"api_key": "' + CANARY + '"}'], ['--json={"api_key": "' + REDACTED + '"}']),
    ],
)
def test_secrets_of_a_command_are_blanked(argv: list[str], shown: list[str]) -> None:
    assert redact_command(argv) == shown


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes/classify_text.py", "--config", "configs/task-classification-long.yaml", "--train.lr=3e-5"],
        ["--max-tokens", "512", "--data.tokenize-processes", "4", "--model.tokenizer", "gpt2"],
        ["--data.name", "hf_datasets/news", "--tokenizer.pad-token", "[PAD]", "--author", "someone"],
    ],
)
def test_what_is_no_secret_is_kept(argv: list[str]) -> None:
    assert redact_command(argv) == argv


def test_secrets_of_settings_are_blanked() -> None:
    settings = {
        "hub": {"token": CANARY, "use_token": True, "other_token": None, "urls": [f"https://a:{CANARY}@host"]},
        "model": {"num_key_value_heads": 8, "eos_token": "</s>", "max_tokens": 512},
        "password": 1234567,
        "credentials": {"user": "me", "word": CANARY},
    }
    assert redact(settings) == {
        "hub": {"token": REDACTED, "use_token": True, "other_token": None, "urls": [f"https://a:{REDACTED}@host"]},
        "model": {"num_key_value_heads": 8, "eos_token": "</s>", "max_tokens": 512},
        "password": REDACTED,
        "credentials": REDACTED,
    }


def test_secrets_of_a_configuration_that_is_no_yaml_are_blanked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config(f"a: [1\ntoken: {CANARY}\nb: hf_{CANARY}\n")
    assert run.read_config() == f"a: [1\ntoken: {REDACTED}\nb: {REDACTED}\n"


def test_the_package_is_cheap_to_import() -> None:
    script = "import sys, toolkit.report; print(*sorted({'torch', 'matplotlib', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_json_is_indented_for_readers(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_report({"a": {"b": 1}})
    assert run.report_path.read_text() == json.dumps({"a": {"b": 1}}, indent=2) + "\n"
