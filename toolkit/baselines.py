"""What simpler models reach on the very rows of a network: a linear one, and gradient boosting, of scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from toolkit.data.tables import TableData
from toolkit.errors import ConfigError
from toolkit.requirements import optional
from toolkit.tasks import Task

_MOST_CATEGORIES = 255
"""That scikit-learn's boosting takes in a column; one with more is a number to it."""


def table_baselines(
    data: TableData, task: Task, asked: Literal["auto", "on", "off"], *, seed: int
) -> tuple[dict[str, dict[str, Any]], str]:
    """The test's figures of both, and a note for the user where there are none.

    They are given the splits of the network, its numbers and categories, and the scaled target.

    Args:
        data: in three splits; the boosting stops early by the validation split.
        task: counts what is right.
        asked: `on` insists on them.
        seed: of the boosting.

    Raises:
        ConfigError: scikit-learn is not installed, and they are asked for.
    """
    if asked == "off":
        return {}, ""
    try:
        optional("sklearn", "--baselines on", "tabular")
    except ConfigError as error:
        if asked == "on":
            raise
        return {}, f"there is no linear model and no gradient boosting to compare with: {error.message}. {error.remedy}"
    splits = {role: getattr(data, role)[:] for role in ("train", "validation", "test")}
    numbers = {role: _matrix(rows["numbers"], np.float32) for role, rows in splits.items()}
    categories = {role: _matrix(rows["categories"], np.int32) for role, rows in splits.items()}
    targets = {role: _learnt(data, rows["target"]) for role, rows in splits.items()}
    linear = _linear(data, numbers, categories, targets["train"])
    boosted = _boosted(data, numbers, categories, targets, seed)
    batch = task.collate(splits["test"], False)
    found = {}
    for name, logits in (("linear model", linear), ("gradient boosting", boosted)):
        outputs = SimpleNamespace(logits=torch.from_numpy(np.asarray(logits, np.float64)))
        metrics = task.metrics(task.measure(outputs, batch))
        found[name] = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return found, ""


def _matrix(rows: Any, dtype: Any) -> Any:
    return np.asarray(rows, dtype).reshape(len(rows), -1)


def _learnt(data: TableData, target: Any) -> Any:
    """What the network learns, too: the scaled measurement, or the index of the class."""
    if data.preprocessor.scale is None:
        return np.asarray(target)
    return data.preprocessor.scale.learnt(torch.tensor(target, dtype=torch.float64)).numpy()


def _linear(data: TableData, numbers: Any, categories: Any, target: Any) -> Any:
    """Ridge or logistic regression on the numbers and a column for each category: (rows, outputs) of the test."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import OneHotEncoder

    columns = {role: csr_matrix(values) for role, values in numbers.items()}
    if categories["train"].shape[1]:
        encoder = OneHotEncoder(handle_unknown="ignore").fit(categories["train"])
        columns = {role: hstack([columns[role], encoder.transform(categories[role])]).tocsr() for role in columns}
    if data.preprocessor.labels:
        model = LogisticRegression(max_iter=1000).fit(columns["train"], target)
        return _of_all_classes(model.predict_log_proba(columns["test"]), model.classes_, data)
    return Ridge().fit(columns["train"], target).predict(columns["test"])[:, None]


def _boosted(data: TableData, numbers: Any, categories: Any, target: Any, seed: int) -> Any:
    """Gradient boosting over histograms, up to 1,000 trees: (rows, outputs) of the test."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    columns = {role: np.concatenate([numbers[role], categories[role]], 1) for role in numbers}
    first = numbers["train"].shape[1]
    sizes = data.preprocessor.category_sizes
    options: dict[str, Any] = {
        "max_iter": 1000,
        "early_stopping": True,
        "n_iter_no_change": 20,
        "categorical_features": [first + at for at, size in enumerate(sizes) if size <= _MOST_CATEGORIES],
        "random_state": seed,
    }
    kind = HistGradientBoostingClassifier if data.preprocessor.labels else HistGradientBoostingRegressor
    model = kind(**options)
    model.fit(columns["train"], target["train"], X_val=columns["validation"], y_val=target["validation"])
    if data.preprocessor.labels:
        with np.errstate(divide="ignore"):
            logits = np.log(model.predict_proba(columns["test"]).clip(1e-12))
        return _of_all_classes(logits, model.classes_, data)
    return model.predict(columns["test"])[:, None]


def _of_all_classes(logits: Any, classes: Any, data: TableData) -> Any:
    """With those that training lost to its limits: never the answer."""
    found = np.full((len(logits), len(data.preprocessor.labels)), -1e9)
    found[:, classes] = logits
    return found
