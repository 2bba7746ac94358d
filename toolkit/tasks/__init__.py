"""What a batch means: how samples are collated, counted, scored and measured. One file for each task."""

from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification
from toolkit.tasks.contrast import Contrast
from toolkit.tasks.language_modeling import LanguageModeling
from toolkit.tasks.preferences import REFERENCE_FREE, Preferences, Scores

__all__ = ["REFERENCE_FREE", "Batch", "Classification", "Contrast", "LanguageModeling", "Preferences", "Scores", "Task"]
