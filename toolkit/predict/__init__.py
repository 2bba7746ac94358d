"""`toolkit predict`: what the model that a run has saved says of texts and rows: classes, names, answers, numbers; or
how it goes on with them.

`find_model` checks a run's folder without reading a weight, `read_texts` reads a file, `Classifier` or `Writer` loads
the model and answers; the command is in `toolkit.predict.command`. The class of a text is that of the recipe's own
evaluation: the same cut, the same padding mask, fp32.

The two are imported when they are first asked for, with torch, transformers and datasets: they take seconds, and a
misspelt path or a missing column is told at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.predict.prediction import Prediction
from toolkit.predict.saved import SavedModel, find_model
from toolkit.text_files import read_texts

if TYPE_CHECKING:
    from toolkit.predict.classifier import Classifier
    from toolkit.predict.writer import Writer

__all__ = ["Classifier", "Prediction", "SavedModel", "Writer", "find_model", "read_texts"]

_SLOW = {"Classifier": "toolkit.predict.classifier", "Writer": "toolkit.predict.writer"}


def __getattr__(name: str) -> Any:
    if name not in _SLOW:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_SLOW[name]), name)
