"""Another model that is trained in the same way as that of a run, for the difference that its beginning makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from toolkit.compute import replace_dropout
from toolkit.data.loader import Loader
from toolkit.engine import evaluate, train_step
from toolkit.errors import NumericsError
from toolkit.optim import adamw
from toolkit.session import Session
from toolkit.strategies import choose_strategy
from toolkit.tasks import Task

FOLDER = "rivals"


def train_rival(
    session: Session, model: nn.Module, task: Task, train: Loader, test: Loader, *, title: str
) -> dict[str, Any]:
    """The figures on the test split of another model after the same steps, under the same strategy.

    It sees the same samples in the same order, at the same learning rates, with the same seed. It is trained once in
    the life of a run, in one go, and leaves nothing but its figures (`rivals/TITLE.json`). To be called on all ranks
    after `session.setup` and before the run's own first step.

    Args:
        session: of the run.
        model: in fp32, equal on all ranks, as `session.setup` takes it.
        task, train, test: of the run.
        title: what it is called.

    Raises:
        Interrupted: a signal asked to stop; the next start begins anew with it.
        NumericsError: a loss that is not finite.
    """
    file = session.folder.path / FOLDER / f"{title}.json"
    if session.world.on_main(file.exists):
        found: dict[str, Any] = session.world.on_main(lambda: json.loads(file.read_text(encoding="utf-8")))
        return found
    config = session.config
    if session.world.device.type == "cpu":
        replace_dropout(model)  # as the run's own
    strategy = choose_strategy(
        config.strategy,
        world=session.world,
        precision=session.precision,
        shape=session.shape,
        max_grad_norm=config.train.max_grad_norm,
    )
    strategy.setup(model, lambda wrapped: adamw(wrapped, config.optim))
    session.console.note(f"{title}: trained for {session.total_steps:,} steps, to stand beside the run's own model")
    for step in train.steps(session.total_steps):
        result = train_step(strategy, task, step, learning_rate=session.schedule(step.number), seed=config.run.seed)
        if result.fault:
            raise NumericsError(f"{title}: {result.fault}", "Lower --optim.lr, or use --precision fp32.")
        session.progress(title, step.number, session.total_steps)
    strategy.synchronize()
    figures = evaluate(strategy, task, test)
    strategy.teardown()
    session.world.on_main(lambda: _write(session, title, figures))
    return figures


def _write(session: Session, title: str, figures: Mapping[str, Any]) -> None:
    folder = session.folder.path / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"{title}.json").write_text(json.dumps(dict(figures), indent=2) + "\n", encoding="utf-8")
