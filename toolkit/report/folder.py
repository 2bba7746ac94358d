"""What a run leaves behind: the files of a run folder, and the manifest that says how they came about.

Every file but `metrics.jsonl` is written whole and atomically, so that a reader (or a run that is killed) never
meets half of one. Nothing that is written here holds a secret: see `redact`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil
import yaml

from toolkit.errors import CheckpointError, FencedError
from toolkit.folders import Guard, unguarded

REDACTED = "REDACTED"

_PACKAGES = (
    *("largemodel-toolkit", "torch", "accelerate", "transformers", "tokenizers", "datasets", "safetensors", "numpy"),
    *("deepspeed", "peft", "bitsandbytes"),
)
_ENVIRONMENT = re.compile(
    r"(ACCELERATE|FSDP|NCCL|GLOO|TORCH|PYTORCH|MKL|KMP)_[A-Z0-9_]+"
    r"|OMP_(NUM_THREADS|PROC_BIND|PLACES)|CUDA_(VISIBLE_DEVICES|DEVICE_MAX_CONNECTIONS|LAUNCH_BLOCKING)"
    r"|CUBLAS_WORKSPACE_CONFIG|PYTHONHASHSEED|TOKENIZERS_PARALLELISM|HF_(HUB|DATASETS)_OFFLINE|TRANSFORMERS_OFFLINE"
    r"|SLURM_(JOB_ID|JOB_NAME|JOB_NODELIST|JOB_PARTITION|JOB_NUM_NODES|NTASKS|NTASKS_PER_NODE|NODEID|RESTART_COUNT)"
)

# Tokens of tokenizers are no secrets, and a configuration without them could not be run again.
_NO_SECRET = re.compile(r"(pad|eos|bos|unk|mask|sep|cls|special|image|decoder_start)_tokens?$")
_SECRET_NAME = re.compile(
    r"secret|passw|passphrase|credential|(api|access|private)_?key|pwd|(^|_)(auth|authorization|jwt|cookies?)(_|$)"
)
# These may also name a count (`max_tokens`, `num_key_value_heads`), so a number under them is kept.
_SECRET_NAME_OR_COUNT = re.compile(r"(token|key|keys)(_|$)|tokens$")
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{8,}|gh[a-z]_[A-Za-z0-9]{10,}|github_pat_\w{10,}"
    r"|glpat-[\w-]{10,}|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{12,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)
# In running text: `Bearer …`, `scheme://user:password@host`, and `token=…`, `"api_key": "…"` inside a longer value.
_SECRET_IN_TEXT = re.compile(
    r"(?i)(bearer\s+|://[^/\s:@]*:(?=[^/\s@]+@)|(?<![A-Za-z])(?:[a-z]+[-_])?"
    r"(?:token|secret|password|passwd|api[-_]?key|authorization)[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic)\s+)?)"
    r"[^\s\"',;&}@]+"
)
_COUNT = re.compile(r"\d{1,12}(\.\d{1,6})?")


class RunFolder:
    """The folder of one run. Writers create it; readers raise `CheckpointError` on what is missing or damaged.

    Args:
        path: of the folder.
        guard: asked before anything is published.
    """

    def __init__(self, path: Path | str, guard: Guard = unguarded) -> None:
        self.path = Path(path)
        self._guard = guard
        self.config_path = self.path / "config.yaml"
        self.manifest_path = self.path / "manifest.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.report_path = self.path / "report.json"
        self.html_path = self.path / "report.html"

    def write_config(self, yaml_text: str) -> None:
        """Write the resolved configuration as it stands, or with its secrets blanked where it has any."""
        _write(self.config_path, _redact_yaml(yaml_text), self._guard)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write `manifest.json`."""
        _write_json(self.manifest_path, redact(manifest), self._guard)

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write `report.json`, the final figures."""
        _write_json(self.report_path, report, self._guard)

    def write_page(self, html: str) -> None:
        """Write `report.html`; `toolkit.report.write_html` makes the text of it."""
        _write(self.html_path, html, self._guard)

    def write_card(self, text: str) -> None:
        """Write the README of the saved model, which is there."""
        _write(self.path / "model" / "README.md", text, self._guard)

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append one JSON object a line to `metrics.jsonl` and flush; a number that is not finite becomes null."""
        text = "".join(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics_path.open("ab+") as file:
                self._guard()
                _mend_tail(file)
                file.write(text.encode())
                file.flush()
        except OSError as error:
            raise _not_written(self.metrics_path, error) from error

    def truncate_metrics(self, last_step: int) -> None:
        """Drop the lines past `last_step`: a resumed run calls it before it takes its first step."""
        if self.metrics_path.exists():
            kept = [line for line in self.read_metrics() if (line.get("step") or 0) <= last_step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            _write(self.metrics_path, text, self._guard)

    def read_config(self) -> str:
        """The text of `config.yaml`."""
        return _read(self.config_path)

    def read_manifest(self) -> dict[str, Any]:
        """`manifest.json`."""
        return _read_object(self.manifest_path)

    def read_report(self) -> dict[str, Any]:
        """`report.json`."""
        return _read_object(self.report_path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last line that a kill cut short is dropped."""
        lines = _read_bytes(self.metrics_path).split(b"\n")
        unfinished = lines.pop()
        metrics = []
        for number, line in enumerate(lines, 1):
            if (parsed := _object(line)) is None:
                raise CheckpointError(
                    f"{self.metrics_path}, line {number}: not a JSON object.",
                    "The file was changed after it was written. Remove the line, or start the run in another folder.",
                )
            metrics.append(parsed)
        last = _object(unfinished)
        return metrics if last is None else [*metrics, last]


def build_manifest(
    argv: Sequence[str],
    seed: int,
    data_fingerprint: str,
    requested: Mapping[str, Any],
    effective: Mapping[str, Any],
    world: Mapping[str, Any],
) -> dict[str, Any]:
    """All that is needed to tell two runs apart, without secrets.

    Args:
        argv: the command line, as in `sys.argv`.
        seed: seed of the run.
        data_fingerprint: what identifies the data that the run reads.
        requested: the settings that the user gave.
        effective: the same keys, as they took effect.
        world: ranks, nodes, devices and backend.
    """
    manifest = {
        "format": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(redact_command(argv)),
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "world": redact(world),
        "requested": redact(requested),
        "effective": redact(effective),
        "versions": versions(),
        "git": _git(),
        "host": socket.gethostname(),
        "hardware": _hardware(),
        "environment": {
            name: redact(value)
            for name, value in sorted(os.environ.items())
            if _ENVIRONMENT.fullmatch(name) and not _is_secret(name)
        },
    }
    plain: dict[str, Any] = _plain(manifest)
    return plain


def redact(value: Any) -> Any:
    """`value` with every secret in it replaced: by the name of its key, or by its own look (`hf_…`, `sk-…`)."""
    if isinstance(value, Mapping):
        return {key: REDACTED if _is_secret(str(key), item) else redact(item) for key, item in value.items()}
    if isinstance(value, str):
        return _SECRET_VALUE.sub(REDACTED, _SECRET_IN_TEXT.sub(rf"\1{REDACTED}", value))
    return [redact(item) for item in value] if isinstance(value, list | tuple) else value


def redact_command(argv: Sequence[str]) -> list[str]:
    """The arguments of a command without its secrets: `--token=X`, `--token X Y`, `TOKEN=X` and bare `hf_…`."""
    return list(_redacted_arguments(argv))


def _redacted_arguments(argv: Iterable[str]) -> Iterator[str]:
    flag = ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        if equals and _is_secret(name, value):
            yield f"{name}={REDACTED}"
            flag = ""
        elif argument.startswith("-"):
            yield redact(argument)
            flag = "" if equals else name
        else:
            yield REDACTED if _is_secret(flag, argument) else redact(argument)


def _is_secret(name: str, value: Any = "") -> bool:
    """Whether `name` says that `value` is a secret. Switches and unset values never are."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")
    if value is None or isinstance(value, bool) or _NO_SECRET.search(words):
        return False
    if _SECRET_NAME.search(words):
        return True
    kept = isinstance(value, Mapping | int | float) or bool(_COUNT.fullmatch(str(value)))
    return bool(_SECRET_NAME_OR_COUNT.search(words)) and not kept


def _redact_yaml(text: str) -> str:
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        return str(redact(text))
    blanked = redact(settings)
    # The text is kept to the letter where it can be: comments and the order of keys are worth having.
    return text if blanked == settings else yaml.safe_dump(blanked, sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """Commit of the current directory and whether tracked files differ from it; None outside a repository."""
    commit = _git_output("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git_output("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git_output(*arguments: str) -> str | None:
    try:
        # Without optional locks a run that starts beside a commit of its user does not get in its way.
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    # Here and not above: torch takes seconds to import, and readers of a run folder do not need it.
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """`value` in what JSON knows: no NaN, no tensors or arrays, no text that UTF-8 cannot hold."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return redact(str(value).encode("utf-8", "backslashreplace").decode())


def _write_json(path: Path, content: Mapping[str, Any], guard: Guard) -> None:
    _write(path, json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, indent=2) + "\n", guard)


def _write(path: Path, text: str, guard: Guard) -> None:
    """Write through a temporary file, so that `path` holds the old text or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        guard()
        temporary.replace(path)
    except FencedError:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from error


def _mend_tail(file: IO[bytes]) -> None:
    """Cut off what a kill left after the last line break, or the next line would be glued to it."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if _object(content[end:]) is not None:
        file.write(b"\n")
    else:
        file.truncate(end)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _read_object(path: Path) -> dict[str, Any]:
    parsed = _object(_read_bytes(path))
    if parsed is None:
        raise CheckpointError(
            f"{path}: not a JSON object.", "The file is damaged: take it from a backup, or run again."
        )
    return parsed


def _read(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).",
            "The file is damaged: take it from a backup, or run again.",
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}.",
            "Name the folder of a run (it holds config.yaml, manifest.json, metrics.jsonl and report.json).",
        ) from error


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror}).", "Free the disk, or choose another folder for the run."
    )
