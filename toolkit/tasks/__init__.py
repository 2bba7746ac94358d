"""What a batch means: how samples are collated, counted, scored and measured. One file for each task."""

from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification
from toolkit.tasks.language_modeling import LanguageModeling
from toolkit.tasks.preferences import REFERENCE_FREE, Preferences, Scores
from toolkit.tasks.seq2seq import Answering, PairBatch, Seq2Seq

__all__ = [
    "REFERENCE_FREE",
    "Answering",
    "Batch",
    "Classification",
    "LanguageModeling",
    "PairBatch",
    "Preferences",
    "Scores",
    "Seq2Seq",
    "Task",
]
