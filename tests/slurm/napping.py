"""The classifier's recipe with a pause after each step: a run that lasts, and leaves the machine to others."""

from __future__ import annotations

import functools
import os

from recipes.bert_cls import Config
from tests.faults.trapped import Naps, main
from toolkit.start import start

NAP = float(os.environ.get("NAP", "0.1"))
"""Seconds."""

if __name__ == "__main__":
    start(functools.partial(main, trap=Naps(naps={("logged", 0, 0): NAP})), Config, __doc__ or "")
