"""What a batch means: how samples are collated, counted, scored and measured. One file for each task."""

from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification
from toolkit.tasks.language_modeling import LanguageModeling
from toolkit.tasks.next_item import NextItem
from toolkit.tasks.preferences import REFERENCE_FREE, Preferences, Scores
from toolkit.tasks.tables import TableClassification, TableRegression, table_task

__all__ = [
    "REFERENCE_FREE",
    "Batch",
    "Classification",
    "LanguageModeling",
    "NextItem",
    "Preferences",
    "Scores",
    "TableClassification",
    "TableRegression",
    "Task",
    "table_task",
]
