from __future__ import annotations

import json

from toolkit.progress import Progress


def test_it_comes_back_from_json() -> None:
    progress = Progress(step=7, epoch=1, samples=84, loss=0.25, recent_losses=[0.5, 0.25], left_out={3: "nan"})
    progress.note_evaluation({"loss": 0.75, "accuracy": 0.5})
    assert Progress.from_state(json.loads(json.dumps(progress.state()))) == progress


def test_the_best_evaluation_and_how_many_it_has_stood() -> None:
    progress = Progress()
    for step, loss in [(2, 0.9), (4, 0.5), (6, 0.5), (8, 0.7)]:
        progress.step = step
        progress.note_evaluation({"loss": loss})
    assert (progress.best_loss, progress.best_step, progress.stale, progress.evaluated) == (0.5, 4, 2, 8)


def test_metrics_are_those_of_the_current_step() -> None:
    progress = Progress(step=2, loss=0.5)
    progress.note_evaluation({"loss": 0.75, "accuracy": 1.0})
    assert progress.metrics() == {"loss": 0.5, "validation_loss": 0.75, "validation_accuracy": 1.0}
    progress.step = 3
    assert progress.metrics() == {"loss": 0.5}
