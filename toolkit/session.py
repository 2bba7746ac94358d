"""The life of a run: checks, folder, plan, steps, evaluations, stopping, and what is left behind.

A recipe holds the story of its task; a `Session` does what every story needs around it. Mistakes are found in the
order of their cost: settings before data, data before the model, all of them before the ranks are connected and
before the run's folder exists.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from toolkit.adapters import adapter_of, check_adapter, left_out
from toolkit.checkpoint.adapted import export_adapter
from toolkit.checkpoint.export import write_base, write_model
from toolkit.compute import (
    check_checkpointing,
    check_fp8,
    compile_seconds,
    keep_less,
    make_ready,
    remove_padding,
)
from toolkit.config import AdapterConfig, CheckpointConfig, GenerateConfig, RecipeConfig, plain, to_yaml
from toolkit.data.loader import BatchShape, Loader, Step, batch_shape
from toolkit.engine import StepResult, evaluate, train_step
from toolkit.environment import Job, launched
from toolkit.errors import CheckpointError, ConfigError, DataError, FencedError, NumericsError, ToolkitError
from toolkit.fingerprint import code_files, package_versions
from toolkit.generation import beginning, continue_texts, write_each
from toolkit.graphs import Graphs, check_graphs, check_recordable
from toolkit.journal import Journal
from toolkit.lease import Lease, break_lock, take
from toolkit.look import stop_looking
from toolkit.memory import give_back_freed, peak_bytes
from toolkit.models import parameter_counts
from toolkit.numerics import LossGuard
from toolkit.optim import Schedule, adamw, build_schedule, check_optimizer
from toolkit.overview import manifest, overview
from toolkit.pace import Pace
from toolkit.precision import choose_precision
from toolkit.preview import preview
from toolkit.probe import probe_gradients
from toolkit.profiler import Profiler, refuse_in_vain, span
from toolkit.progress import Progress
from toolkit.prompts import check_prompt
from toolkit.quantization import checksum, describe_quantization
from toolkit.recovery import Recovery
from toolkit.report import Console, RunFolder, Trackers, redact, versions
from toolkit.report.figures import figures_in
from toolkit.runs import check_shared, find_run, lock, open_folder, refuse_begun, refuse_other_data
from toolkit.sharing import stop_offering
from toolkit.signals import StopRequest
from toolkit.strategies import choose_low_bit, choose_strategy
from toolkit.strategies.base import TorchStrategy
from toolkit.tasks import Task
from toolkit.watchdog import Watchdog
from toolkit.world import world

_SLOW_ON_CPUS = {
    "fp16": "few CPUs multiply fp16 in hardware: expect this to be very slow; bf16 is not.",
    "fp8": "no CPU multiplies fp8: it is emulated, slower than bf16, so that you see what it does to the loss.",
}
_SHOWN = 160
"""Characters that the screen shows of a text."""


class Previewed(Exception):
    """What `--run.show` asked for has been shown."""


class Interrupted(Exception):
    """All ranks have agreed to stop, because a signal asked for it; what they had done is saved."""


class Session:
    """One run of a recipe.

    Args:
        recipe: its name, which names the folder of its runs.
        config: its settings; the sections of `RecipeConfig` are read here.
        micro_batch: samples of the largest micro-batch, where the settings name none.

    Attributes:
        world: this rank among the others.
        console: the screen; silent on other ranks than the first.
        strategy: how the model lies on the ranks; to be used after `setup`.
        low_bit: in how many bits the frozen base of an adapter is to be held.
        schedule: learning rate by optimizer step; there after `setup`.
        total_steps: optimizer steps of the run; there after `loaders`.

    Raises:
        ConfigError, LaunchError: a setting that contradicts another or the way the processes were started.
    """

    schedule: Schedule
    total_steps: int

    def __init__(self, recipe: str, config: RecipeConfig, *, micro_batch: int = 32) -> None:
        self.recipe = recipe
        self.config = config
        self.world = world()
        self.console = Console(quiet=not self.world.main)
        # Not every network has layers to adapt, and its recipe then has no such settings.
        self._adapter: AdapterConfig = getattr(config, "adapter", AdapterConfig())
        check_adapter(self._adapter)
        check_prompt(self._adapter, config.train)
        if self._adapter.name != "none" and config.checkpoint.max_shard_size != CheckpointConfig().max_shard_size:
            raise ConfigError("--checkpoint.max_shard_size has no effect on an adapter, which is one file", "Drop it.")
        train = config.train
        self.shape: BatchShape = batch_shape(
            train.global_batch, train.micro_batch, self.world.size, largest=micro_batch
        )
        self.precision = choose_precision(config.precision, self.world)
        self.strategy = choose_strategy(
            config.strategy,
            world=self.world,
            precision=self.precision,
            shape=self.shape,
            max_grad_norm=config.train.max_grad_norm,
        )
        kind = config.train.activation_checkpointing
        check_checkpointing(kind, config.train.compile, self.strategy.name, self.world.device)
        if self.precision.name == "fp8":
            check_fp8(self.strategy.name, self._adapter.name)
        offloads = self.strategy.config.offload not in (None, "none")
        check_optimizer(config.optim, self.strategy.name, self.world.device, offloads=offloads)
        self.low_bit = choose_low_bit(self.strategy, getattr(config, "quantization", "none"), self._adapter.name)
        if config.train.cuda_graphs:
            check_graphs(self.strategy, config.train.activation_checkpointing, self.low_bit.wanted)
        Trackers(config.run.trackers, Path(), "", {}, main=False)  # refuses unknown names before anything is loaded
        self._run = find_run(recipe, config)
        self._folder: RunFolder | None = None
        self._stop = StopRequest(launched=launched())
        self._cleanup = contextlib.ExitStack()
        self._progress = Progress()
        self._guard = LossGuard(config.train.spike)
        self._fault = ""
        self._generate = GenerateConfig()
        self._ready = False
        self._began = self._last_time = time.monotonic()
        self._seconds_before = 0.0
        self._pace = Pace()
        self._profiler = Profiler(config.run.profile, self.world)
        self._graphs: Graphs | None = None

    @property
    def folder(self) -> RunFolder:
        """The run's folder; there after `setup` has begun."""
        assert self._folder is not None, "the run's folder is made by setup"
        return self._folder

    def __enter__(self) -> Self:
        return self

    def loaders(
        self,
        task: Task,
        train: Any,
        validation: Any,
        test: Any,
        *,
        workers: int | None = None,
        max_bad_rows: int = 0,
        width: int = 768,
    ) -> tuple[Loader, Loader, Loader]:
        """Batches of the three splits for this rank; fixes how many steps the run has.

        Args:
            task: collates the samples, and reads the settings of the loss.
            train, validation, test: Arrow data sets with a column `length`.
            workers: processes that collate; 0 collates in this one. By default 1 for a GPU, 0 for a CPU.
            max_bad_rows: training samples that may turn out unfit before the run stops.
            width: the model's hidden size, by which the work of a sample is judged where it is dealt to the ranks.

        Raises:
            ConfigError: a setting that this task does not read, or a schedule that does not fit the run.
        """
        stop_looking()
        if self.config.train.label_smoothing and not task.smooths_labels:
            raise ConfigError(
                f"--train.label_smoothing has no effect on the task {type(task).__name__}", "Leave it at 0."
            )
        on_gpu = self.world.device.type == "cuda"
        options: dict[str, Any] = {
            "rank": self.world.rank,
            "seed": self.config.run.seed,
            "workers": int(on_gpu) if workers is None else workers,
            "pin_memory": on_gpu,
            "problem": task.problem,
            "width": width,
        }
        training = Loader(train, task.collate, self.shape, **options)
        steps = self.config.train.steps
        self.total_steps = steps or math.ceil(self.config.train.epochs * training.steps_per_epoch)
        self.schedule = build_schedule(self.config.optim, self.total_steps)
        self._check_evaluations(training.steps_per_epoch)
        refuse_in_vain(self.config.run.profile, self.total_steps)
        evaluation = BatchShape(0, self.config.train.eval_batch, 1, self.world.size)
        self._task, self._train, self._max_bad_rows = task, training, max_bad_rows
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
            tokenizer: saved beside the model; None where its inputs need none. What else prepares inputs and is to be
                saved beside it (a feature extractor, a processor) may stand in its place.
            data_fingerprint: equal on all ranks.
            plan: sections of the plan that the recipe knows (model, data).

        Raises:
            LaunchError: the ranks do not meet, or do not hold the same settings, data and weights.
            CheckpointError: the folder holds another run.
            Interrupted: a signal asked to stop after the attempt had begun; raised on all ranks.
            Previewed: samples were asked for, and are shown.
        """
        if self.config.run.show:
            first = next(self._train.steps(1)).micro_batches
            if "input_ids" not in first[0].inputs:
                raise ConfigError(
                    f"--run.show has no effect on the recipe {self.recipe}, which reads no texts", "Drop it."
                )
            self.console.samples(preview(self._task, first, tokenizer, self.config.run.show))
            raise Previewed
        self.world.connect()
        if self.world.connected:
            same = self.world.same_on_all_ranks
            if self.world.size > self.world.local_size:  # on one node all ranks read the same files
                same("the code, or the version of a package,", [code_files(), package_versions()])
            same("the configuration", plain(self.config))
            same("the data", data_fingerprint)
            same("the initial weights", [checksum(p) for p in model.parameters()])
        stop_offering()
        total, trainable = parameter_counts(model)
        quantized = describe_quantization(model, self.precision.dtype)
        adapter = adapter_of(model)
        if adapter is None and self._adapter.name != "none":
            raise ConfigError(f"--adapter.name has no effect on the recipe {self.recipe}", "Drop it.")
        if self.low_bit.wanted and not quantized:
            raise ConfigError(f"--quantization has no effect on the recipe {self.recipe}", "Drop it.")
        padding = self._remove_padding(model)
        self._padding_free = padding == "none"
        if not self.config.train.compile:  # else the compiler decides what is kept
            keep_less(model)
        if trainable < total and not self._run.known:
            self.world.on_main(lambda: self._probe(model))
        if self.config.train.cuda_graphs:
            check_recordable(self._task, padding)
        ready = make_ready(model, self.config.train, self.precision.name, self.world.device)
        ratio = self._adapter.lr_ratio or 1.0
        self.strategy.left_out = left_out(model)
        self.strategy.setup(model, lambda wrapped: adamw(wrapped, self.config.optim, ratio))
        if self.config.train.cuda_graphs:
            assert isinstance(self.strategy, TorchStrategy)
            self._graphs = Graphs(self.strategy, self._task)
        self._tokenizer = tokenizer
        path, number = self.world.on_main(self._open_folder)
        self._lease = Lease(path, number)
        self._folder = RunFolder(path, self._lease.check)
        check_shared(self.folder.path, self.world)
        self._journal = Journal(self.folder, self.config, self.console, self.world)
        self._resume(data_fingerprint, {"base": adapter.fingerprint} if adapter else {})
        run = {"folder": str(self.folder.path)}
        if self._progress.step:
            run["goes on"] = f"after step {self._progress.step:,}, attempt {self._recovery.attempt}"
        parameters = {"parameters": f"{total:,}, {trainable:,} trainable"}
        rows = {section: {name: redact(value) for name, value in values.items()} for section, values in plan.items()}
        adapted = {"adapter": adapter.describe()} if adapter else {}
        rows["model"] = rows.get("model", {}) | parameters | quantized | adapted
        rows |= overview(self.strategy, self.schedule, self.config, self._train.steps_per_epoch) | {"run": run}
        if getattr(model, "main_input_name", "input_ids") == "input_ids":
            rows["training"]["padding"] = padding
        rows["training"] |= ready
        if self._graphs is not None:
            rows["training"]["launched"] = "as CUDA graphs, recorded when a shape comes for the second time"
        self.world.on_main(lambda: self._write_manifest(data_fingerprint))
        module: Any = self.strategy.module
        self.world.on_main(lambda: write_base(module, tokenizer, self.folder.path / "base", self._lease.check))
        self._journal.plan(rows, [self.schedule(step) for step in range(1, self.total_steps + 1)])
        if self.world.device.type == "cpu" and self.precision.name in _SLOW_ON_CPUS:
            self.console.warn(_SLOW_ON_CPUS[self.precision.name])
        give_back_freed()  # of weights in fp32, and of the probe
        self._watchdog = self._make_watchdog()
        self._watchdog.start()
        self._ready = True
        self._stop_if_asked()

    def describe(self, **facts: Any) -> None:
        """Add facts to the report (labels, majority, data)."""
        self._journal.report |= facts

    def compare(self, test: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> None:
        """Show, and keep for the report, the figures of other models on the very test samples beside this one's."""
        if not others:
            return
        self.describe(baselines=others)
        models = [test, *others.values()]
        rows = [
            [figure.name, *("" if figure.key not in model else f"{model[figure.key]:,.4f}" for model in models)]
            for figure in figures_in(*others.values())
            if figure.better
        ]
        self.console.table("on the same held-out samples", ("", "this network", *others), rows)
        self.console.note("")

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the weights as they are."""
        return self._progress.step

    def evaluate(self, loader: Loader, title: str, *, task: Task | None = None) -> dict[str, Any]:
        """The metrics of the run's task, or of another, over all samples of `loader`, with progress.

        Raises:
            Interrupted: a signal asked to stop; raised on all ranks after the same batch.
        """
        self._finish_profile()  # which is of steps alone
        self._watchdog.beat("evaluation", self._progress.step)
        return evaluate(self.strategy, task or self._task, loader, self._on_batch(loader, title))

    def score_texts(
        self,
        loader: Loader,
        title: str,
        score: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]],
        *,
        show: int = 0,
        beams: int | None = None,
    ) -> dict[str, Any]:
        """Figures of what the model writes for all samples of `loader`, with progress; alike on every rank.

        Args:
            loader: of a task that gives prompts (`Seq2Seq`).
            title: shown beside the bar.
            score: figures of the texts that were written (first) and wanted; called on one rank.
            show: so many of them stand on the screen and in the report.
            beams: another number than the model's own.

        Raises:
            Interrupted: a signal asked to stop; raised on all ranks after the same batch.
        """
        step = self._progress.step
        texts = write_each(
            self.strategy,
            loader.once(),
            self._tokenizer,
            beams=beams,
            on_token=lambda: self._watchdog.beat("evaluation", step),
            on_batch=self._on_batch(loader, title),
        )
        for one in texts[:: max(1, len(texts) // show)][:show] if show else ():
            self._progress.texts.append({"step": step, "prompt": one.source, "text": one.text, "wanted": one.target})
            given, text, wanted = (_shortened(part) for part in (one.source, one.text, one.target))
            self.console.note(f"{given}\n  → {text}\n  wanted: {wanted}")
        return self.world.on_main(lambda: {**score([one.text for one in texts], [one.target for one in texts])})

    def _on_batch(self, loader: Loader, title: str) -> Callable[[int], None]:
        """Between the batches of a pass over `loader`: progress, and a stop where a signal asks for it."""
        total = loader.forwards_of_one_pass
        return lambda done: self.progress(title, done, total)

    def progress(self, title: str, done: int, total: int) -> None:
        """Between two parts of long work beside the steps: show how far it is, and stop where a signal asks for it.

        Raises:
            Interrupted: on all ranks after the same part.
        """
        self._watchdog.beat("evaluation", self._progress.step)
        self.console.evaluation(title, done, total)
        if done < total:
            self._stop_if_asked()

    def evaluation_due(self, step: int) -> bool:
        """Whether the validation split is to be evaluated after this step."""
        every = self.config.run.eval_every
        if every:
            return step % every == 0
        return step % self._train.steps_per_epoch == 0 or step == self.total_steps

    def alive(self) -> None:
        """Say that an evaluation gets on: for a task that takes long over one batch."""
        self._watchdog.beat("evaluation", self._progress.step)

    def baseline(
        self,
        loader: Loader,
        title: str,
        more: Callable[[], Mapping[str, Any]] = dict,
        *,
        task: Task | None = None,
    ) -> dict[str, Any]:
        """The metrics before training: measured once in the life of a run, and remembered when it goes on.

        Args:
            loader: of the test split.
            title: shown beside the bar.
            more: further figures, such as those of texts that the model writes.
            task: measures in the place of the run's own.
        """
        if self._progress.baseline is None:
            self._progress.baseline = self.evaluate(loader, title, task=task) | {**more()}
            self._continue_texts()
        return self._progress.baseline

    def steps(self, loader: Loader, validation: Loader) -> Iterator[Step]:
        """The steps of the run that are still to be taken; between them it evaluates and saves, where that is due.

        It ends early where `early_stopping` says so. With `keep_best` the best weights are in force at the end.

        Raises:
            Interrupted: a signal asked to stop; raised on all ranks after the same step, which is saved.
            CheckpointError: a save failed; raised on all ranks.
        """
        total, progress = self.total_steps, self._progress
        with self.console.progress(total, start=progress.step, log_every=self.config.run.log_every) as self._bar:
            if self.config.train.on_fault == "rewind" and self._recovery.saved is None:
                self._save()  # there must be something to go back to
            self._evaluate_if_due(validation)  # what a signal cut short
            while self._progress.step < total and not self._stale():
                yield from self._steps_until_a_fault(loader, validation)
        if self._recovery.saved != self._progress.step:
            self._save()
        self._watchdog.beat("saving", self._progress.step)  # which may take its time, as reading may
        if self.config.checkpoint.keep_best and (best := self._recovery.load_best(self._progress.best_step)):
            self.console.note(f"the weights of step {best.step}, with the lowest validation loss, are in force")

    def write_texts(
        self,
        config: GenerateConfig,
        encode: Callable[[str, Any], list[int]] = beginning,
        ends: Collection[int] = (),
    ) -> None:
        """Let the model, one of language, go on with some texts before training and after each evaluation.

        Args:
            config: what it is given, and how long it may go on.
            encode: a prompt as tokens, with the tokenizer of `setup`.
            ends: tokens that end what it writes, beside the tokenizer's own.
        """
        self._generate, self._encode, self._ends = config, encode, ends

    def train_step(self, step: Step) -> StepResult:
        """`engine.train_step` with the run's learning rate, seed and guard against bad losses."""
        return train_step(
            self.strategy,
            self._task,
            step,
            learning_rate=self.schedule(step.number),
            seed=self.config.run.seed,
            refuse=self._guard.refuse,
            graphs=self._graphs,
        )

    def log(self, step: Step, result: StepResult) -> None:
        """Write the figures of a step to metrics.jsonl, the screen, the trackers and the ledger of samples.

        Raises:
            NumericsError: the step was refused, and `on_fault` or `max_rewinds` says to stop; on all ranks alike.
        """
        with span("log"):
            self._log(step, result)

    def _log(self, step: Step, result: StepResult) -> None:
        if self.world.main:
            self._lease.check()
        if result.fault:
            self._note_fault(result.fault)
            return
        now = time.monotonic()
        seconds, self._last_time = now - self._last_time, now
        rate, progress = step.samples / seconds, self._progress
        progress.step, progress.epoch, progress.samples = step.number, step.epoch, step.samples_seen
        progress.loss = result.loss if math.isfinite(result.loss) else None
        progress.training_seconds += seconds
        line: dict[str, Any] = {
            "step": step.number,
            "epoch": step.epoch,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": self.schedule(step.number),
            "units": result.units,
            "samples_seen": step.samples_seen,
            "seconds": self._seconds,
            "samples_per_second": rate,
        }
        if self.world.size > 1:
            line["imbalance"] = step.imbalance
        more = {"lr": line["lr"]}
        if result.loss_scale is not None:
            progress.skipped_steps += not result.applied
            line |= {"loss_scale": result.loss_scale, "skipped": not result.applied}
            more |= {"skipped": progress.skipped_steps, "scale": result.loss_scale}
        self._recovery.consumed(step)
        self._journal.step(line, last=step.number == self.total_steps)
        self._bar.update(step.number, loss=result.loss, samples_per_second=rate, **more)
        if result.skipped_rows:
            self._note_bad_rows(step)
        self._pace.add(result.busy)

    def finish(
        self,
        *,
        before: Mapping[str, Any],
        test: Mapping[str, Any],
        majority: float | None = None,
        predict: str = '"TEXT"',
    ) -> None:
        """Save the model, write the reports and show the final figures.

        Args:
            before, test: metrics on the test split, untrained and trained.
            majority: share of its most frequent label, where there are labels.
            predict: what `toolkit predict` is to be given behind the run, as an example; nothing where it cannot.
        """
        self._watchdog.beat("saving", self._progress.step)
        self._recovery.wait()
        self._save_model()
        command = (
            f"toolkit predict {self.folder.path} {predict}" if predict and self.config.checkpoint.save_model else ""
        )
        self.describe(before=before, test=test, majority=majority, predict=command)
        self._close_report("finished")
        self.world.on_main(self._journal.write_report)
        if self.config.checkpoint.save_model:
            self.world.on_main(self._journal.write_card)
        self._journal.summary()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave a partial report where something ended the run, and part from the other ranks where all agree."""
        with self._cleanup:  # to the end of it: the signal that is being answered may come twice
            self.console.close()
            if self._ready:  # else the report in the folder is of those who were before
                self._watchdog.stop()
                self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        status = "finished" if error is None else "interrupted" if stopped else "failed"
        agreed = error is None or isinstance(error, (Interrupted, ToolkitError))
        agreed = agreed and not isinstance(
            error, FencedError
        )  # each rank finds out for itself, and the others may be gone
        if agreed:
            with contextlib.suppress(ToolkitError):  # `error` is told; this one would hide it
                self._recovery.wait()
        if self.world.main:
            with contextlib.suppress(OSError, ToolkitError):
                self._recovery.end(status, self._progress.step, redact(str(error or "")))
        self._recovery.close()
        # Now that all is entered: these take seconds, and a launcher may lose its patience.
        if agreed:
            self._profiler.close()
        else:  # a collective may be in flight on a GPU, and its trace would wait for it
            self._profiler.drop()
        if error is not None and self.world.main and "test" not in self._journal.report:
            with contextlib.suppress(ToolkitError):
                self.describe(**{"error": str(error)} if str(error) else {})
                self._close_report(status)
                self._journal.write_report()
                self.console.note(f"the report so far: {self.folder.html_path}")
        if agreed:
            self._journal.close()
            self.strategy.teardown()
            self.world.close()

    @property
    def _seconds(self) -> float:
        """Of all attempts."""
        return self._seconds_before + time.monotonic() - self._began

    def _steps_until_a_fault(self, loader: Loader, validation: Loader) -> Iterator[Step]:
        for step in self._fetched(loader):
            if reason := self._progress.left_out.get(step.number):
                self._leave_out(step, reason)
            else:
                yield step
            if self._fault:
                self._rewind(step, loader)
                return
            assert self._progress.step == step.number, "session.log was not told of the step"
            self._after(step, validation)
            if self._stale():
                self.console.note(
                    f"early stopping after step {step.number}: "
                    f"no lower validation loss since step {self._progress.best_step}"
                )
                return

    def _fetched(self, loader: Loader) -> Iterator[Step]:
        """The steps, with the time that the data took."""
        steps = loader.steps(self.total_steps, self._progress.step)
        while True:
            if over := self._progress.step == self.total_steps or self._profiler.complete:
                self._finish_profile()
            if not over:
                self._profiler.next_step(self._progress.step + 1)
            self._last_time = time.monotonic()
            self._watchdog.beat("data", self._progress.step + 1)
            with span("data"):
                step = next(steps, None)
            if step is None:
                return
            self._watchdog.beat("step", step.number)
            self._pace.add(time.monotonic() - self._last_time)
            self._profiler.note(step.micro_batches)
            yield step

    def _after(self, step: Step, validation: Loader) -> None:
        """What all ranks do between two steps, by what they agree on in one exchange."""
        wishes = torch.zeros(3 + self.world.size)
        wishes[0] = bool(self._stop.reason)
        wishes[1] = self._recovery.failed
        wishes[2] = self.world.main and self._recovery.due(step.number)  # one clock decides
        wishes[3 + self.world.rank] = self._pace.take()
        stop, failed, due, *busy = self.world.sum(wishes).tolist()
        if failed:
            self._recovery.wait()
        if self.evaluation_due(step.number) or step.number == self.total_steps:
            self.strategy.synchronize()
        if not self.strategy.synchronized:  # ranks that hold different weights can wait a few steps to be saved
            stop = due = False
        if not stop:
            self._evaluate_if_due(validation)
        best = self.config.checkpoint.keep_best and self._progress.best_step == step.number
        if due or (best and not stop):
            self._save()
        if stop:
            self._interrupt()
        for rank, seconds in self._pace.note(busy, step.imbalance):
            self.console.warn(f"rank {rank} is slow: {seconds:.2f} s a step for data and forward; the others wait")

    def _finish_profile(self) -> None:
        if not self._profiler.tracing:
            return
        self._watchdog.beat("saving", self._progress.step)
        facts = {"padding": self.config.train.padding_free, "sharded": self.strategy.name in ("fsdp", "zero3")}
        profile = self._profiler.finish(padding_free=self._padding_free, facts=facts)
        if problem := profile.get("problem"):
            self.console.warn(f"there is no profile: {problem}")
        else:
            self.describe(profile=profile)

    def _evaluate_if_due(self, validation: Loader) -> None:
        progress = self._progress
        if progress.evaluated == progress.step or not self.evaluation_due(progress.step):
            return
        metrics = self.evaluate(validation, "validation")
        figures = {key: value for key, value in metrics.items() if isinstance(value, float)}
        progress.note_evaluation(figures)
        self._journal.evaluation(progress.step, figures)
        self._continue_texts()

    def _continue_texts(self) -> None:
        config, step = self._generate, self._progress.step
        if not config.prompts:
            return
        texts = continue_texts(
            self.strategy,
            self._tokenizer,
            [self._encode(prompt, self._tokenizer) for prompt in config.prompts],
            ends={self._tokenizer.eos_token_id, *self._ends},
            tokens=config.tokens,
            temperature=config.temperature,
            seed=self.config.run.seed,
            on_token=lambda: self._watchdog.beat("evaluation", step),
        )
        for prompt, text in zip(config.prompts, texts, strict=True):
            self._progress.texts.append({"step": step, "prompt": prompt, "text": text})
            self.console.note(f"{prompt} … {text}")

    def _save(self) -> None:
        progress = self._progress
        self._watchdog.beat("saving", progress.step)
        progress.seconds, progress.recent_losses = self._seconds, self._guard.recent
        facts = {"epoch": progress.epoch, "samples_seen": progress.samples, "metrics": progress.metrics()}
        with span("checkpoint"):
            self._recovery.save(progress.step, facts | {"state": progress.state()})

    def _stop_if_asked(self) -> None:
        if self.world.sum(torch.tensor(bool(self._stop.reason))):
            self._interrupt()

    def _interrupt(self) -> None:
        """Save what is not saved yet, and stop on all ranks."""
        reason, step = self._stop.reason or "a signal to another rank", self._progress.step
        self.console.warn(f"{reason}: stopping after step {step} of {self.total_steps}")
        self._watchdog.beat("saving", step)
        if step and self._recovery.saved != step:
            self._save()
        self._recovery.wait()
        self._lease.check()  # who is fenced is not to be queued again
        if step:
            self.console.note(f"saved: the same command goes on from step {step}")
        raise Interrupted(reason)

    def _resume(self, data_fingerprint: str, base: dict[str, str]) -> None:
        """Go on where the run's newest good checkpoint left off, or begin."""
        self._recovery = Recovery(
            self.folder.path,
            self._lease,
            self.strategy,
            self.world,
            self.config.checkpoint,
            {"versions": versions(), "data_fingerprint": data_fingerprint, **base},
            self.console.warn,
        )
        if self._run.known:
            self._recovery.refuse_hopeless()
            self.world.on_main(lambda: refuse_other_data(self.folder, data_fingerprint))
            if checkpoint := self._recovery.resume():
                self._progress = Progress.from_state(checkpoint.manifest["state"])
        progress = self._progress
        if progress.step > self.total_steps:
            raise CheckpointError(
                f"{self.folder.path} has taken {progress.step} steps, and --train.steps asks for {self.total_steps}",
                "Ask for as many or more.",
            )
        self._guard = LossGuard(self.config.train.spike, progress.recent_losses)
        self._seconds_before = progress.seconds
        # From here on a signal is only noted, on every rank before the first enters the attempt: one that a signal ends
        # without a word counts as a crash, and after a few of these the run would be given up.
        self._cleanup.enter_context(self._stop)
        self.world.gather(None)
        self._begin_attempt(self._train)

    def _begin_attempt(self, loader: Loader) -> None:
        effective = self.strategy.effective()
        facts = {key: effective[key] for key in ("strategy", "precision", "device")}
        changes = {key: list(pair) for key, pair in self._run.changes.items()}
        self._recovery.begin(self._progress.step, loader, facts | {"changes": redact(changes)})
        self._journal.begin(self._progress.step, self._recovery.attempt)
        self._profiler.folder = self.folder.path / "profile" / f"attempt{self._recovery.attempt}"

    def _note_fault(self, fault: str) -> None:
        train = self.config.train
        if train.on_fault == "stop" or self._progress.rewinds >= train.max_rewinds:
            often = f" after {self._progress.rewinds} rewinds" if self._progress.rewinds else ""
            raise NumericsError(
                f"{fault}{often}",
                "Nothing was applied at this step. Lower --optim.lr, use --precision bf16 or fp32, look at these "
                "samples, or leave them out with --train.on_fault rewind.",
            )
        self._fault = fault

    def _rewind(self, step: Step, loader: Loader) -> None:
        """Back to the newest good checkpoint; the samples of the step, or of all since then, are left out."""
        fault, self._fault, before = self._fault, "", self._progress
        self._finish_profile()
        self._watchdog.beat("saving", step.number)
        self._recovery.wait()
        checkpoint = self._recovery.resume()
        if checkpoint is None:
            raise NumericsError(fault, "There is no good checkpoint to go back to.")
        self._progress = after = Progress.from_state(checkpoint.manifest["state"])
        first = after.step + 1 if before.rewound_to == after.step else step.number
        # What was left out for a reason of its own keeps it.
        after.left_out = dict(sorted((dict.fromkeys(range(first, step.number + 1), fault) | before.left_out).items()))
        after.rewinds, after.rewound_to = before.rewinds + 1, after.step
        self._guard = LossGuard(self.config.train.spike, after.recent_losses)
        self._begin_attempt(loader)
        steps = f"step {first}" if first == step.number else f"steps {first} to {step.number}"
        self.console.warn(f"{fault}: back to step {after.step}; the samples of {steps} are left out")

    def _leave_out(self, step: Step, reason: str) -> None:
        progress = self._progress
        self._recovery.left_out(step, reason)
        progress.step, progress.epoch, progress.samples = step.number, step.epoch, step.samples_seen
        if self.world.main:
            self.folder.append_metrics([{"step": step.number, "epoch": step.epoch, "left_out": reason}])

    def _note_bad_rows(self, step: Step) -> None:
        rows = sorted(row for rows in self.world.gather(step.skipped) for row in rows)
        known = set(self._progress.bad_rows)
        new = [(sample, why) for sample, why in rows if sample not in known]
        self._progress.bad_rows += [sample for sample, _ in new]
        shown = "; ".join(f"sample {sample}: {why}" for sample, why in new[:5])
        if len(self._progress.bad_rows) > self._max_bad_rows:
            raise DataError(
                f"{len(self._progress.bad_rows)} training samples are unfit, the last at step {step.number}: {shown}",
                f"Mend them, or raise --data.max_bad_rows above {self._max_bad_rows}.",
            )
        if new:
            self.console.warn(f"step {step.number}: {len(new)} unfit samples are left out ({shown})")

    def _make_watchdog(self) -> Watchdog:
        return Watchdog(
            self.folder.path,
            rank=self.world.rank,
            size=self.world.size,
            attempt=self._recovery.attempt,
            minimum=self.config.run.hang_seconds or math.inf,
            guard=self._lease.check,
        )

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

    def _remove_padding(self, model: nn.Module) -> str:
        """What the plan says of it."""
        wish = self.config.train.padding_free
        why = "as asked" if wish == "off" else remove_padding(model)
        if why and wish == "on":
            raise ConfigError(f"--train.padding_free on has no effect on this model: {why}", "Leave it at auto.")
        return f"to the longest of a micro-batch ({why})" if why else "none"

    def _probe(self, model: nn.Module) -> None:
        """Does a gradient come to what is trained? Told before the run has a folder."""
        with torch.random.fork_rng(devices=[]):  # the loader draws a seed for its workers
            first = next(self._train.steps(1))
        if batches := [batch for batch in first.micro_batches if self._task.units(batch)]:
            # The least of them: here the model is whole, its weights in fp32, and a probe takes more than a step.
            batch = min(batches, key=lambda one: sum(tensor.numel() for tensor in one.inputs.values()))
            device = self.world.device
            probe_gradients(model.to(device), self._task, batch.to(device), self.precision)

    def _open_folder(self) -> tuple[Path, int]:
        path, job = open_folder(self.recipe, self._run), Job.read()
        break_lock(path, job)
        self._lock = lock(path)
        if not self._run.known:
            refuse_begun(RunFolder(path))
        lease = take(path, job)
        if not self._run.known:
            # Before all else: what a kill leaves from here on is a run to go on with.
            RunFolder(path, lease.check).write_config(to_yaml(self.config))
        return path, lease.number

    def _write_manifest(self, data_fingerprint: str) -> None:
        self.folder.write_config(to_yaml(self.config))
        self.folder.write_manifest(manifest(self.strategy, self.schedule, self.config, data_fingerprint))

    def _close_report(self, status: str) -> None:
        balance = self._pace.balance() if self.world.size > 1 else None
        compiling = {"compile_seconds": compile_seconds()} if self.config.train.compile else {}
        recorded = {}
        if self._graphs is not None:
            recorded["cuda_graphs"] = {"shapes": self._graphs.shapes, "seconds": self._graphs.seconds}
        self.describe(balance=balance, peak_bytes=peak_bytes(self.world.device), **compiling, **recorded)
        self._journal.close_report(status, self._progress, self._seconds, self._recovery.attempt)

    def _save_model(self) -> None:
        if not self.config.checkpoint.save_model:
            return
        guard = self._lease.check
        guard()
        weights, target = self.strategy.weights(), self.folder.path / "model"
        module: Any = self.strategy.module
        if adapter_of(module):
            self.world.on_main(lambda: export_adapter(self.folder.path / "base", weights, target, guard=guard))
            return
        size = self.config.checkpoint.max_shard_size
        self.world.on_main(lambda: write_model(module, weights, self._tokenizer, target, size, guard))

    def _stale(self) -> bool:
        patience = self.config.run.early_stopping
        return patience is not None and self._progress.stale >= patience


def _shortened(text: str) -> str:
    """On one line of the screen, or two."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} …"
