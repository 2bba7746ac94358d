"""What a batch means: how samples are collated, counted, scored and measured. One file for each task."""

from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification
from toolkit.tasks.language_modeling import LanguageModeling

__all__ = ["Batch", "Classification", "LanguageModeling", "Task"]
