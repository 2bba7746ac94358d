"""What is handed to a run is never executed, leads nowhere else, and is not told on: whole runs, real payloads.

Rows of the security table that have their tests elsewhere: DCP's `.metadata`, names in it and in the index of foreign
safetensors (`unit/test_checkpoint_foreign.py`); links in a checkpoint, and for one (`test_corruption.py`); what an
export follows (`unit/test_checkpoint_export.py`); members of archives (`unit/test_samples.py`); names of runs
(`unit/test_runs.py`) and in trackers (`unit/report/test_report_trackers.py`); remote code and pickles in the model of
a run (`unit/test_predict.py`); commits of data sets (`unit/data/test_text_sources.py`); YAML (`unit/test_config.py`);
what counts as a secret (`unit/report/test_report_folder.py`); rendezvous on loopback (`unit/test_launch_run.py`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.faults.jobs import Job, finish, last_step
from tests.faults.trapped import Naps, Trap, main
from tests.ranks import on_ranks
from tests.recipes.launching import RECIPE, ROOT, environment
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.manifest import read_manifest, write_manifest
from toolkit.checkpoint.store import Store
from toolkit.cli import main as toolkit
from toolkit.config import ModelConfig, TextDataConfig
from toolkit.data.sources import read, resolve
from toolkit.errors import RESUMABLE_EXIT_CODE, DataError, ModelError
from toolkit.models import load_classifier, load_tokenizer
from toolkit.predict.classifier import Classifier
from toolkit.predict.saved import find_model

LABELS = ["money", "music", "sport"]
CANARY = "canary0123456789"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "WANDB_API_KEY": CANARY,
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "DATABASE_URL": f"postgres://user:{CANARY}@host/base",
    "TORCH_AUTH_TOKEN": CANARY,  # among those that are recorded, by its first word
    "NCCL_EXTRA": f"hf_{CANARY}",  # and by its look no number of retries
    "A_NAME_THAT_SAYS_NOTHING": CANARY,
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def payloads(tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """The content of three kinds of file, of which none is ever to be loaded."""
    payload, modern, legacy = Payload(tmp_path / "executed"), io.BytesIO(), io.BytesIO()
    torch.save({"weight": payload}, modern)
    torch.save({"weight": payload}, legacy, _use_new_zipfile_serialization=False)
    yield {"plain": pickle.dumps(payload), "modern": modern.getvalue(), "legacy": legacy.getvalue()}
    assert not (tmp_path / "executed").exists(), "a payload was run"


def test_the_payloads_would_work(payloads: dict[str, bytes], tmp_path: Path) -> None:
    for content in (payloads["modern"], payloads["legacy"]):
        torch.load(io.BytesIO(content), weights_only=False)
        (tmp_path / "executed").rmdir()
    pickle.loads(payloads["plain"])
    (tmp_path / "executed").rmdir()


# A run's folder


def with_secrets(config: Any, trap: Trap = Trap()) -> None:  # noqa: B008
    os.environ.update(SECRETS)
    main(config, trap)


@pytest.fixture
def job(tiny_job: list[str], texts_csv: Path, secret_place: Path) -> list[str]:
    return [
        *(*tiny_job, "--data.name", str(secret_place), "--train.steps", "12", "--run.eval_every", "4"),
        *("--checkpoint.every", "2", "--run.trackers", "tensorboard", "--run.hang_seconds", "1"),
    ]


@pytest.fixture(scope="module")
def secret_place(texts_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As an address may be, with what opens it."""
    folder = tmp_path_factory.mktemp("data") / f"api_key={CANARY}"
    folder.mkdir()
    shutil.copy(texts_csv, folder)
    return folder / texts_csv.name


@pytest.fixture(scope="module")
def originals() -> dict[str, Path]:
    return {}


@pytest.fixture
def stopped(job: list[str], originals: dict[str, Path], tmp_path_factory: Any, tmp_path: Path) -> Path:
    """A run that has hung at step 7, was started again, and was stopped at step 8 by a signal."""
    if not originals:
        run = originals["run"] = tmp_path_factory.mktemp("stopped") / "run"
        for trap in (Naps(naps={("step", 7, 0): 60.0}), Trap("logged", 8, signal=signal.SIGTERM)):
            ended = Job(job, run, 1, functools.partial(with_secrets, trap=trap)).wait()
            assert ended.codes == [RESUMABLE_EXIT_CODE], ended.text
        assert (run / "hangs").is_dir()
    return Path(shutil.copytree(originals["run"], tmp_path / "run"))


def test_no_secret_and_no_pickle_is_left(stopped: Path, job: list[str]) -> None:
    """In any file of a run that has hung, was stopped, and has finished."""
    ended = finish(job, stopped, 1, with_secrets)
    assert CANARY not in ended.text
    files = [path for path in stopped.rglob("*") if path.is_file()]
    parts = {path.relative_to(stopped).parts[0] for path in files}
    assert parts >= {"attempts.jsonl", "checkpoints", "config.yaml", "hangs", "manifest.json", "metrics.jsonl", "model"}
    assert parts >= {"report.html", "report.json", "samples", "tensorboard"}
    assert "REDACTED" in (stopped / "config.yaml").read_text()
    for path in files:
        content = path.read_bytes()
        assert CANARY.encode() not in content, f"a secret is in {path}"
        assert not is_pickle(content), f"{path} is a pickle"
        assert path.suffix in KNOWN or path.name.startswith("events.out.tfevents.") or path.name == ".lock", path


KNOWN = {".json", ".jsonl", ".yaml", ".yml", ".html", ".md", ".safetensors", ".txt", ".sha256"}


def is_pickle(content: bytes) -> bool:
    """Of protocol 2 or later, or torch's archive of them."""
    return zipfile.is_zipfile(io.BytesIO(content)) or (content[:1] == b"\x80" and content[1:2] <= b"\x05")


def test_pickles_are_told_from_other_files(payloads: dict[str, bytes], stopped: Path) -> None:
    assert all(map(is_pickle, payloads.values()))
    assert not is_pickle(next(stopped.rglob("*.safetensors")).read_bytes())


def test_pickles_in_a_run_are_left_alone(
    stopped: Path, job: list[str], payloads: dict[str, bytes], tmp_path: Path
) -> None:
    """Wherever other tools keep theirs: it goes on, is exported, and predicts."""
    newest, before = Store(stopped).committed()[:2]
    for folder in (stopped, stopped / "base", stopped / "checkpoints", stopped / "samples", newest[1]):
        for name, content in zip(("optimizer.pt", "pytorch_model.bin", ".metadata"), payloads.values(), strict=True):
            (folder / name).write_bytes(content)
    foreign = stopped / "checkpoints" / "step_00009999"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=foreign, no_dist=True)
    (foreign / ".metadata").write_bytes(payloads["plain"])
    (stopped / "checkpoints" / "step_00009998").mkdir()

    ended = finish(job, stopped)
    assert Attempts(stopped).read()[-1].from_step == before[0]
    said = " ".join(ended.text.split())
    assert "of step 9999 is damaged and not used" in said
    assert "of step 9998 is damaged and not used" in said
    assert f"of step {newest[0]} is damaged and not used: .metadata does not belong there" in said
    (stopped / "model" / "pytorch_model.bin").write_bytes(payloads["modern"])
    (stopped / "model" / "training_args.bin").write_bytes(payloads["plain"])
    assert toolkit(["predict", str(stopped), "the match"]) == 0
    assert toolkit(["checkpoint", "export", str(stopped), str(tmp_path / "exported")]) == 0
    assert not [path for path in (tmp_path / "exported").iterdir() if is_pickle(path.read_bytes())]


def test_a_manifest_that_names_files_elsewhere(stopped: Path, job: list[str], tmp_path: Path) -> None:
    """With digests that are right: the files are neither taken for the run's own, nor moved, nor removed."""
    (step, folder), content = Store(stopped).committed()[0], b"of somebody else"
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for number, name in enumerate(("../../../outside.safetensors", str(outside), "..", "a/../../x"), start=1):
        forged = shutil.copytree(folder, folder.with_name(f"step_{step + number:08}"))
        manifest = read_manifest(forged)
        body = manifest | {"step": step + number, "files": manifest["files"] | {name: entry}}
        write_manifest(forged, body)
    ended = finish([*job, "--checkpoint.keep", "9"], stopped)
    assert Attempts(stopped).read()[-1].from_step == step
    assert ended.text.count("is damaged and not used") == 4
    assert outside.read_bytes() == content


def test_what_a_run_reads_of_itself_is_no_program(stopped: Path, job: list[str], tmp_path: Path) -> None:
    settings = (stopped / "config.yaml").read_text()
    mark = tmp_path / "executed"
    (stopped / "config.yaml").write_text(settings + f"x: !!python/object/apply:os.mkdir ['{mark}']\n")
    ended = Job(job, stopped).wait()
    assert ended.codes == [2]
    assert "config.yamlisdamaged" in "".join(ended.text.replace("│", "").split()), "wherever its lines end"
    assert not mark.exists()


# A model's folder


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A classifier with weights, as a user may have got it from somebody."""
    on_ranks(save_classifier, 1, str(tiny_model), str(tmp_path / "model"))
    return tmp_path / "model"


def save_classifier(source: str, target: str) -> None:
    config = ModelConfig(name=source, init="random")
    load_classifier(config, LABELS, seed=0).save_pretrained(target)
    load_tokenizer(config).save_pretrained(target)


def trained_from(folder: Path) -> Any:
    load_tokenizer(ModelConfig(name=str(folder)))
    return load_classifier(ModelConfig(name=str(folder)), LABELS, seed=0)


def predicting(folder: Path) -> Any:
    return Classifier(find_model(folder), device="cpu")


USES = pytest.mark.parametrize("use", [trained_from, predicting])


@USES
@pytest.mark.parametrize("kind", ["plain", "modern", "legacy"])
def test_a_model_that_is_a_pickle(
    use: Callable[[Path], Any], kind: str, model: Path, payloads: dict[str, bytes]
) -> None:
    (model / "training_args.bin").write_bytes(payloads[kind])
    (model / "pytorch_model.bin").write_bytes(payloads[kind])
    use(model)  # there are safetensors, too
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        use(model)


@USES
def test_an_index_that_names_a_pickle(use: Callable[[Path], Any], model: Path, payloads: dict[str, bytes]) -> None:
    write_index(model, "evil.bin")
    (model / "evil.bin").write_bytes(payloads["modern"])
    with pytest.raises(ModelError):
        use(model)


@USES
@pytest.mark.parametrize("name", ["../outside.safetensors", "absolute", "link.safetensors"])
def test_an_index_that_leads_out_of_the_folder(
    use: Callable[[Path], Any], name: str, model: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(model / "model.safetensors", outside)
    (model / "link.safetensors").symlink_to(outside)
    write_index(model, str(outside) if name == "absolute" else name)
    with pytest.raises(ModelError):
        use(model)


def test_a_snapshot_of_the_hubs_cache_is_made_of_links(model: Path, tmp_path: Path) -> None:
    """As the hub's client lays models down: names in the snapshot lead to blobs beside it."""
    tensors, index = load_file(model / "model.safetensors"), {"metadata": {}, "weight_map": {}}
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, model / f"model-{number}.safetensors", {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, f"model-{number}.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    cached = tmp_path / "models--someone--model"
    snapshot, blobs = cached / "snapshots" / "0123abc", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        path.rename(blobs / f"sha_{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha_{path.name}")
    loaded = trained_from(snapshot).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
    outside = tmp_path / "outside.safetensors"
    (blobs / "sha_model-2.safetensors").rename(outside)
    (snapshot / "model-2.safetensors").unlink()
    (snapshot / "model-2.safetensors").symlink_to(outside)
    with pytest.raises(ModelError, match="symbolic link"):
        trained_from(snapshot)


def write_index(model: Path, name: str) -> None:
    """One that says that all weights are in that file; what is beside it is no longer read."""
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file({"nothing": torch.ones(1)}, model / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


CODE = """
import os
from transformers import BertConfig, BertForSequenceClassification
os.mkdir({mark!r})
class Config(BertConfig):
    model_type = "own"
class Model(BertForSequenceClassification):
    config_class = Config
"""


@USES
def test_code_that_comes_with_a_model(use: Callable[[Path], Any], model: Path, tmp_path: Path) -> None:
    """Not even where somebody says yes to all that is asked (`yes | …`)."""
    (model / "own.py").write_text(CODE.format(mark=str(tmp_path / "executed")))
    settings = json.loads((model / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}}
    (model / "config.json").write_text(json.dumps(settings | own | {"model_type": "own"}))
    assert on_ranks(refused, 1, use, model) == [True]
    assert not (tmp_path / "executed").exists()


def refused(use: Callable[[Path], Any], folder: Path) -> bool:
    os.environ["HF_MODULES_CACHE"] = str(folder.parent / "modules")
    sys.stdin = io.StringIO("y\n" * 99)
    try:
        use(folder)
    except ModelError:
        return True
    return False


# Data


@pytest.mark.parametrize("name", ["texts.pkl", "texts.pt", "texts.npy", "texts.csv", "texts.jsonl", "texts.parquet"])
def test_data_that_are_a_pickle(name: str, payloads: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(payloads["plain"])
    with pytest.raises(DataError):
        read(resolve(TextDataConfig(name=str(tmp_path / name))), "text", "label", tmp_path / "scratch")


# The network


@pytest.mark.slow
def test_a_run_on_one_node_listens_on_loopback_alone(tiny_job: list[str], tmp_path: Path) -> None:
    config = ROOT / "configs" / "accelerate" / "cpu2.yaml"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "launch", "run", "--", "--config_file", str(config), str(RECIPE)),
            *(*tiny_job, "--train.steps", "100000", "--run.dir", str(tmp_path / "run")),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while last_step(tmp_path / "run") < 3:
        assert process.poll() is None, process.communicate()[0]
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [c for member in family for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=90)
    assert process.returncode == RESUMABLE_EXIT_CODE, text
    assert {socket.laddr.ip for socket in sockets} == {"127.0.0.1"}
