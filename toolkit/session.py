"""The life of a run: checks, folder, plan, steps, evaluations, stopping, and what is left behind.

A recipe holds the story of its task; a `Session` does what every story needs around it. Mistakes are found in the
order of their cost: settings before data, data before the model, all of them before the ranks are connected and
before the run's folder exists.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from toolkit.config import CheckpointConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig, plain, to_yaml
from toolkit.data.loader import BatchShape, Loader, Step, batch_shape
from toolkit.engine import StepResult, evaluate
from toolkit.errors import CheckpointError, ConfigError, ToolkitError
from toolkit.models import parameter_counts
from toolkit.optim import Schedule, adamw, build_schedule
from toolkit.precision import choose_precision
from toolkit.report import Console, RunFolder, Trackers, build_manifest, write_html
from toolkit.strategies import choose_strategy
from toolkit.tasks import Task
from toolkit.world import world


class RecipeConfig(Protocol):
    """The sections that every recipe's settings have."""

    @property
    def train(self) -> TrainConfig:
        """How long, and in what batches."""

    @property
    def optim(self) -> OptimConfig:
        """Optimizer and schedule."""

    @property
    def precision(self) -> str:
        """Number format."""

    @property
    def strategy(self) -> StrategyConfig:
        """Layout over the ranks."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """What is kept."""

    @property
    def run(self) -> RunConfig:
        """Folder, seed, reporting."""


class Interrupted(Exception):
    """All ranks have agreed to stop after a step, because a signal asked for it."""


@dataclass
class _Best:
    """The lowest validation loss so far, and how many evaluations it has stood."""

    loss: float = math.inf
    step: int = 0
    stale: int = 0


class Session:
    """One run of a recipe.

    Args:
        recipe: its name, which names the folder of its runs.
        config: its settings; the sections of `RecipeConfig` are read here.

    Attributes:
        world: this rank among the others.
        console: the screen; silent on other ranks than the first.
        strategy: how the model lies on the ranks; to be used after `setup`.
        schedule: learning rate by optimizer step; there after `setup`.
        total_steps: optimizer steps of the run; there after `loaders`.

    Raises:
        ConfigError, LaunchError: a setting that contradicts another or the way the processes were started.
    """

    schedule: Schedule
    total_steps: int

    def __init__(self, recipe: str, config: RecipeConfig) -> None:
        self.recipe = recipe
        self.config = config
        self.world = world()
        self.console = Console(quiet=not self.world.main)
        self.shape: BatchShape = batch_shape(config.train.global_batch, config.train.micro_batch, self.world.size)
        self.precision = choose_precision(config.precision, self.world)
        self.strategy = choose_strategy(
            config.strategy,
            world=self.world,
            precision=self.precision,
            shape=self.shape,
            max_grad_norm=config.train.max_grad_norm,
        )
        Trackers(config.run.trackers, Path(), "", {}, main=False)  # refuses unknown names before anything is loaded
        if config.run.dir and config.run.name:
            raise ConfigError("--run.name has no effect beside --run.dir", "Drop one of the two.")
        _refuse_taken(self._folder_asked_for())
        self._folder: RunFolder | None = None
        self._ready = False
        self._began = time.monotonic()
        self._report: dict[str, Any] = {"evaluations": [], "steps": 0}
        self._best = _Best()
        self._signals: list[float] = []
        self._skipped = 0
        self._training_seconds = 0.0
        self._samples = 0

    @property
    def folder(self) -> RunFolder:
        """The run's folder; there after `setup` has begun."""
        assert self._folder is not None, "the run's folder is made by setup"
        return self._folder

    def __enter__(self) -> Self:
        return self

    def loaders(
        self, task: Task, train: Any, validation: Any, test: Any, *, workers: int = 0
    ) -> tuple[Loader, Loader, Loader]:
        """Batches of the three splits for this rank; fixes how many steps the run has.

        Args:
            task: collates the samples, and reads the settings of the loss.
            train, validation, test: Arrow data sets with a column `length`.
            workers: processes that collate; 0 collates in this one.

        Raises:
            ConfigError: a setting that this task does not read, or a schedule that does not fit the run.
        """
        if self.config.train.label_smoothing and not task.smooths_labels:
            raise ConfigError(
                f"--train.label_smoothing has no effect on the task {type(task).__name__}", "Leave it at 0."
            )
        options: dict[str, Any] = {
            "rank": self.world.rank,
            "seed": self.config.run.seed,
            "workers": workers,
            "pin_memory": self.world.device.type == "cuda",
        }
        training = Loader(train, task.collate, self.shape, **options)
        steps = self.config.train.steps
        self.total_steps = steps or math.ceil(self.config.train.epochs * training.steps_per_epoch)
        self.schedule = build_schedule(self.config.optim, self.total_steps)
        self._check_evaluations(training.steps_per_epoch)
        evaluation = BatchShape(0, self.config.train.eval_batch, 1, self.world.size)
        self._task, self._train = task, training
        return (
            training,
            Loader(validation, task.collate, evaluation, **options),
            Loader(test, task.collate, evaluation, **options),
        )

    def setup(
        self, model: nn.Module, *, tokenizer: Any, data_fingerprint: str, plan: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Connect the ranks, lay the model over them, open the run's folder and show the plan.

        Args:
            model: in fp32, equal on all ranks.
            tokenizer: saved beside the model.
            data_fingerprint: equal on all ranks.
            plan: sections of the plan that the recipe knows (model, data).

        Raises:
            LaunchError: the ranks do not meet, or do not hold the same settings, data and weights.
            CheckpointError: the folder holds another run.
        """
        self.world.connect()
        self.world.same_on_all_ranks("the configuration", plain(self.config))
        self.world.same_on_all_ranks("the data", data_fingerprint)
        self.world.same_on_all_ranks(
            "the initial weights", [float(p.detach().double().sum()) for p in model.parameters()]
        )
        total, trainable = parameter_counts(model)
        self.strategy.setup(model, lambda wrapped: adamw(wrapped, self.config.optim))
        self._tokenizer = tokenizer
        self._folder = RunFolder(self.world.on_main(self._open_folder))
        self._trackers = Trackers(
            self.config.run.trackers, self.folder.path, self.folder.path.name, plain(self.config), self.world.main
        )
        rows = self._plan_rows(plan, total, trainable)
        rates = [self.schedule(step) for step in range(1, self.total_steps + 1)]
        self._report |= {
            "plan": rows,
            "learning_rates": rates[:: max(1, len(rates) // 500)],
            "run": str(self.folder.path),
        }
        self.world.on_main(lambda: self._write_manifest(data_fingerprint))
        self.console.plan(rows, rates)
        if self.precision.name == "fp16" and self.world.device.type == "cpu":
            self.console.warn("few CPUs multiply fp16 in hardware: expect this to be very slow; bf16 is not.")
        self._ready = True

    def describe(self, **facts: Any) -> None:
        """Add facts to the report (labels, majority, data)."""
        self._report |= facts

    def evaluate(self, loader: Loader, title: str) -> dict[str, Any]:
        """The task's metrics over all samples of `loader`, with progress."""
        total = loader.forwards_of_one_pass
        return evaluate(
            self.strategy, self._task, loader, on_batch=lambda done: self.console.evaluation(title, done, total)
        )

    def steps(self, loader: Loader) -> Iterator[Step]:
        """The steps of the run, with progress and signals; ends early where `early_stopping` says so.

        Raises:
            Interrupted: a signal asked to stop; raised on all ranks after the same step.
        """
        self._last_time = time.monotonic()
        with (
            self._listening(),
            self.console.progress(self.total_steps, log_every=self.config.run.log_every) as progress,
        ):
            self._progress = progress
            for step in loader.steps(self.total_steps):
                yield step
                self._report["steps"] = step.number
                if self._asked_to_stop():
                    self.console.warn(f"interrupted: stopped after step {step.number} of {self.total_steps}")
                    raise Interrupted
                if self._stale():
                    self.console.note(
                        f"early stopping after step {step.number}: "
                        f"no lower validation loss since step {self._best.step}"
                    )
                    break

    def log(self, step: Step, result: StepResult) -> None:
        """Write the figures of a step to metrics.jsonl, the screen and the trackers."""
        now = time.monotonic()
        seconds, self._last_time = now - self._last_time, now
        rate = step.samples / seconds
        line: dict[str, Any] = {
            "step": step.number,
            "epoch": step.epoch,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": self.schedule(step.number),
            "units": result.units,
            "samples_seen": step.samples_seen,
            "seconds": now - self._began,
            "samples_per_second": rate,
        }
        more = {"lr": line["lr"]}
        if result.loss_scale is not None:
            self._skipped += not result.applied
            line |= {"loss_scale": result.loss_scale, "skipped": not result.applied}
            more |= {"skipped": self._skipped, "scale": result.loss_scale}
        if self.world.main:
            self.folder.append_metrics([line])
            if step.number % self.config.run.log_every == 0 or step.number == self.total_steps:
                self._trackers.log({f"train/{key}": line[key] for key in ("loss", "grad_norm", "lr")}, step.number)
        self._progress.update(step.number, loss=result.loss, samples_per_second=rate, **more)
        self._training_seconds += seconds
        self._samples = step.samples_seen

    def evaluation_due(self, step: Step) -> bool:
        """Whether the validation split is to be evaluated after this step."""
        every = self.config.run.eval_every
        if every:
            return step.number % every == 0
        return step.number % self._train.steps_per_epoch == 0 or step.number == self.total_steps

    def log_evaluation(self, step: Step, metrics: Mapping[str, Any]) -> None:
        """Note an evaluation on the validation split; early stopping goes by its loss."""
        figures = {key: value for key, value in metrics.items() if isinstance(value, float)}
        self._report["evaluations"].append({"step": step.number, **figures})
        shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key in ("loss", "accuracy"))
        self.console.note(f"validation after step {step.number}: {shown}")
        self._trackers.log({f"validation/{key}": value for key, value in figures.items()}, step.number)
        if metrics["loss"] < self._best.loss:
            self._best = _Best(metrics["loss"], step.number)
        else:
            self._best.stale += 1
        self._last_time = time.monotonic()  # the time of an evaluation is no step's

    def finish(self, *, before: Mapping[str, Any], test: Mapping[str, Any], majority: float) -> None:
        """Save the model, write the reports and show the final figures.

        Args:
            before, test: metrics on the test split, untrained and trained.
            majority: share of its most frequent label.
        """
        self._save_model()
        command = f'toolkit predict {self.folder.path} "TEXT"' if self.config.checkpoint.save_model else ""
        self._report |= {"before": before, "test": test, "majority": majority, "predict": command}
        self._close_report("finished")
        self.world.on_main(self._write_report)
        extra = {
            "time": f"{self._report['seconds']:.0f} s, {self._report['samples_per_second']:.1f} samples/s in training",
            "run": str(self.folder.path),
            "report": str(self.folder.html_path),
        }
        if self._skipped:
            extra["skipped"] = f"{self._skipped} steps, by fp16's loss scaler"
        self.console.summary(_figures(before), _figures(test), majority, extra, command)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave a partial report where something ended the run, and part from the other ranks where all agree."""
        self.console.close()
        if error is not None and self._folder is not None and self.world.main and "test" not in self._report:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            with contextlib.suppress(ToolkitError):
                self._close_report("interrupted" if stopped else "failed", str(error))
                self._write_report()
                self.console.note(f"the report so far: {self.folder.html_path}")
        if isinstance(error, Interrupted):
            self._save_model()
        if self._ready and (error is None or isinstance(error, (Interrupted, ToolkitError))):
            self._trackers.close()
            self.strategy.teardown()
            self.world.close()

    def _check_evaluations(self, steps_per_epoch: int) -> None:
        run, total = self.config.run, self.total_steps
        if run.eval_every and run.eval_every > total:
            raise ConfigError(
                f"--run.eval_every {run.eval_every} has no effect on a run of {total} steps", "Set it lower."
            )
        evaluations = total // run.eval_every if run.eval_every else math.ceil(total / steps_per_epoch)
        if run.early_stopping and run.early_stopping >= evaluations:
            raise ConfigError(
                f"--run.early_stopping {run.early_stopping} has no effect on a run with {evaluations} evaluations",
                "Set it lower, or evaluate more often with --run.eval_every.",
            )

    def _folder_asked_for(self) -> Path | None:
        run = self.config.run
        return run.dir or (Path("runs") / self.recipe / run.name if run.name else None)

    def _open_folder(self) -> Path:
        asked = self._folder_asked_for()
        _refuse_taken(asked)
        parent = Path("runs") / self.recipe
        try:
            (asked or parent).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the folder {asked or parent} cannot be made: {error.strerror}", "Name another with --run.dir."
            ) from error
        if asked is not None:
            return asked
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):
                folder = parent / f"{number:03d}"
                folder.mkdir()
                return folder

    def _plan_rows(
        self, plan: Mapping[str, Mapping[str, str]], total: int, trainable: int
    ) -> dict[str, dict[str, str]]:
        rows = {section: dict(values) for section, values in plan.items()}
        rows.setdefault("model", {})["parameters"] = f"{total:,}, {trainable:,} trainable"
        effective, shape, schedule = self.strategy.effective(), self.shape, self.schedule
        held = f", {effective['share_of_this_rank']:.0%} of it here" if "share_of_this_rank" in effective else ""
        rows["strategy"] = {
            "name": f"{self.strategy.name} ({effective['engine']}{held})",
            "ranks": f"{self.world.size} on {self.world.device.type}",
            "precision": f"{self.precision.name} ({self.precision.reason})",
        }
        rows["training"] = {
            "steps": f"{self.total_steps:,} ({self.total_steps / self._train.steps_per_epoch:.2f} epochs)",
            "batch": f"{shape.global_batch} = {shape.micro_batch} × {shape.accumulation} accumulated "
            f"× {shape.ranks} ranks",
            "optimizer": f"{effective['optimizer']}, weight decay {self.config.optim.weight_decay:g}, "
            f"gradients clipped to {self.config.train.max_grad_norm or 'nothing'}",
            "learning rate": f"{schedule.kind} from {schedule.peak:g}, {schedule.warmup_steps} steps of warm-up",
            "seed": str(self.config.run.seed),
        }
        rows["run"] = {"folder": str(self.folder.path)}
        return rows

    def _write_manifest(self, data_fingerprint: str) -> None:
        launcher = self.world.launcher
        effective = self.strategy.effective() | {
            "total_steps": self.total_steps,
            "warmup_steps": self.schedule.warmup_steps,
            "learning_rate": self.schedule.peak,
            "launcher": {"strategy": launcher.strategy, "precision": launcher.precision},
        }
        self.folder.write_config(to_yaml(self.config))
        self.folder.write_manifest(
            build_manifest(
                sys.argv,
                self.config.run.seed,
                data_fingerprint,
                plain(self.config),
                effective,
                {"ranks": self.world.size, "local_ranks": self.world.local_size, "device": self.world.device.type},
            )
        )

    def _close_report(self, status: str, error: str = "") -> None:
        trained = self._training_seconds
        self._report |= {
            "status": status,
            "seconds": time.monotonic() - self._began,
            "samples_per_second": self._samples / trained if trained else 0.0,
            "skipped_steps": self._skipped,
        }
        if error:
            self._report["error"] = error

    def _write_report(self) -> None:
        self.folder.write_report(self._report)
        write_html(self.folder.path)

    def _save_model(self) -> None:
        if not self.config.checkpoint.save_model:
            return
        weights, target = self.strategy.weights(), self.folder.path / "model"

        def save() -> None:
            module: Any = self.strategy.module
            module.save_pretrained(target, state_dict=weights, max_shard_size=self.config.checkpoint.max_shard_size)
            self._tokenizer.save_pretrained(target)
            for file in target.glob("*.safetensors"):
                shutil.copymode(target / "config.json", file)  # safetensors writes for the owner alone

        self.world.on_main(save)

    def _stale(self) -> bool:
        patience = self.config.run.early_stopping
        return patience is not None and self._best.stale >= patience

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM while steps are taken; they are acted on between two steps, on all ranks alike."""

        def note(number: int, frame: FrameType | None) -> None:
            # A launcher passes on the signal that the terminal has sent to all, so the same wish comes twice.
            if self._signals and time.monotonic() - self._signals[0] > 3:
                raise KeyboardInterrupt
            self._signals.append(time.monotonic())

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _asked_to_stop(self) -> bool:
        return bool(self.world.sum(torch.tensor(len(self._signals))))


def _refuse_taken(folder: Path | None) -> None:
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"--run.dir {folder} is a file", "Name a folder.")
    if any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds another run or other files", "Name a new folder with --run.dir, or remove this one."
        )


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, float)}
