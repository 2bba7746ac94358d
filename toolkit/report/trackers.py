"""Live curves in the trackers that accelerate knows.

Every rank makes a `Trackers`, so that a wrong name stops all of them alike; only the main rank writes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, nearest
from toolkit.report.folder import redact

SUPPORTED = ("tensorboard",)

Scalar = bool | int | float | str


class Trackers:
    """The trackers of one run.

    Args:
        names: which ones; see `SUPPORTED`.
        folder: the run's folder. Event files go to `tensorboard/RUN_NAME` in it.
        run_name: the name under which the run is shown.
        config: the run's settings, nested or not; stored beside the curves without their secrets.
        main: whether this is the rank that writes.
        start_step: the step from which a run goes on: what was logged past it is hidden. None where it begins.

    Raises:
        ConfigError: an unknown name, or a tracker whose package is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        run_name: str,
        config: Mapping[str, Any],
        main: bool,
        *,
        start_step: int | None = None,
    ) -> None:
        for name in names:
            _check(name)
        self._trackers: list[Any] = []
        if main and names:
            self._trackers = [_tensorboard(folder, run_name, start_step)]
            settings = flatten(redact(config))
            # A resumed run has stored its settings already; a second copy would be a second run on the page.
            if settings and start_step is None:
                for tracker in self._trackers:
                    tracker.store_init_configuration(settings)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the figures of a step; nested ones get names with dots, and what is None is left out."""
        if self._trackers:
            scalars = flatten(values)
            for tracker in self._trackers:
                tracker.log(scalars, step=step)

    def close(self) -> None:
        """Write out what is pending. Later calls of `log` do nothing."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; None is left out, and what no tracker knows becomes text."""
    flat: dict[str, Scalar] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = _scalar(value)
    return flat


def _scalar(value: Any) -> Scalar:
    # Numbers of numpy and torch are neither int nor float, and would be dropped without a word.
    plain = value.tolist() if hasattr(value, "tolist") else value
    return plain if isinstance(plain, bool | int | float) else str(redact(str(plain)))


def _check(name: str) -> None:
    if name not in SUPPORTED:
        raise ConfigError(
            f"run.trackers: unknown tracker '{name}'.{nearest(name, SUPPORTED)}",
            f"Known trackers: {', '.join(SUPPORTED)}.",
        )
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"run.trackers: '{name}' is not installed.",
            "Install it with: pip install 'largemodel-toolkit[track]'",
        )


def _tensorboard(folder: Path, run_name: str, start_step: int | None) -> Any:
    # Here and not above: accelerate imports every tracker that is installed, and most runs use none.
    from accelerate.tracking import TensorBoardTracker

    # A name with a slash or dots would put the files somewhere else.
    safe_name = re.sub(r"[^\w-]+", "_", run_name) or "run"
    purge = {} if start_step is None else {"purge_step": start_step + 1}
    tracker = TensorBoardTracker(safe_name, folder / "tensorboard", **purge)
    tracker.start()
    return tracker
