"""What a run says of itself: metrics.jsonl, the curves of trackers, its reports, and the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.config import RecipeConfig, plain
from toolkit.progress import Progress
from toolkit.report import Console, RunFolder, Trackers, model_card, write_html
from toolkit.report.figures import FIGURES
from toolkit.report.step_time import step_time_notes, step_time_rows
from toolkit.world import World

_SHOWN = {"loss", *(figure.key for figure in FIGURES if figure.headline)}


class Journal:
    """The record of one run. Every method may be called by all ranks; the first one writes.

    Args:
        folder: of the run.
        config: its settings.
        console: the screen.
        world: connected ranks.

    Attributes:
        report: what report.json will hold.
    """

    def __init__(self, folder: RunFolder, config: RecipeConfig, console: Console, world: World) -> None:
        self.report: dict[str, Any] = {"run": str(folder.path)}
        self._folder = folder
        self._config = config
        self._console = console
        self._world = world
        self._trackers: Trackers | None = None

    def begin(self, step: int, attempt: int) -> None:
        """An attempt begins after `step`: what another one has written past it is taken back. Collective."""
        self._world.on_main(lambda: self._folder.truncate_metrics(step))
        self.close()
        self._trackers = Trackers(
            self._config.run.trackers,
            self._folder.path,
            self._folder.path.name,
            plain(self._config),
            self._world.main,
            start_step=step if attempt > 1 else None,
        )

    def plan(self, rows: Mapping[str, Mapping[str, str]], rates: list[float]) -> None:
        """Show what the run is about to do, and keep it for the report."""
        self.report |= {"plan": rows, "learning_rates": rates[:: max(1, len(rates) // 500)]}
        self._console.plan(rows, rates)

    def step(self, line: Mapping[str, Any], last: bool) -> None:
        """Enter the figures of a step; into the curves, too, where the settings or the `last` step ask for it."""
        if self._world.main:
            self._folder.append_metrics([line])
            if last or line["step"] % self._config.run.log_every == 0:
                self._log({f"train/{key}": line[key] for key in ("loss", "grad_norm", "lr")}, line["step"])

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Enter an evaluation on the validation split."""
        shown = ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if key in _SHOWN)
        self._console.note(f"validation after step {step}: {shown}")
        self._log({f"validation/{key}": value for key, value in figures.items()}, step)

    def close_report(self, status: str, progress: Progress, seconds: float, attempt: int) -> None:
        """Enter how the run ended, and how far it came."""
        self.report |= {"status": status, "attempts": attempt} | progress.report(seconds)

    def write_report(self) -> None:
        """Write report.json and report.html. For rank 0 alone."""
        self._folder.write_report(self.report)
        write_html(self._folder)

    def write_card(self) -> None:
        """Write the README of the saved model. For rank 0 alone, after the report."""
        self._folder.write_card(model_card(self.report, self._folder.read_manifest()))

    def summary(self) -> None:
        """Show the final figures."""
        report = self.report
        if profile := report.get("profile"):
            header, rows = step_time_rows(profile)
            self._console.table("where the time goes", header, rows)
            for line in step_time_notes(profile):
                self._console.note(line)
            self._console.note("")
        extra = {
            "memory": f"{report['peak_bytes'] / 2**30:.2f} GiB at most (first process)",
            "time": f"{report['seconds']:.0f} s, {report['samples_per_second']:.1f} samples/s in training",
            "run": str(self._folder.path),
            "report": str(self._folder.html_path),
        }
        if balance := report["balance"]:
            extra["balance"] = (
                f"work planned {balance['imbalance']:.1%} apart; "
                f"the average rank waited {balance['waited']:.1%} of data and forward for the slowest"
            )
        if "compile_seconds" in report:
            extra["compiling"] = f"{report['compile_seconds']:.0f} s of them (first process)"
        if "cuda_graphs" in report:
            graphs = report["cuda_graphs"]
            extra["recording CUDA graphs"] = f"{graphs['seconds']:.1f} s of them, for {graphs['shapes']} shapes"
        if report["skipped_steps"]:
            extra["skipped"] = f"{report['skipped_steps']} steps, by fp16's loss scaler"
        before, test = (_figures(report[key]) for key in ("before", "test"))
        self._console.summary(before, test, report["majority"], extra, report["predict"])

    def close(self) -> None:
        """Write out the curves."""
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        assert self._trackers is not None, "begin comes first"
        self._trackers.log(values, step)


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, float)}
