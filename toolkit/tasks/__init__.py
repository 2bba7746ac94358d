"""What a batch means: how samples are collated, counted, scored and measured. One file for each task."""

from toolkit.tasks.base import Batch, Task
from toolkit.tasks.classification import Classification
from toolkit.tasks.contrast import Contrast
from toolkit.tasks.image_classification import ImageClassification
from toolkit.tasks.language_modeling import LanguageModeling
from toolkit.tasks.next_item import NextItem
from toolkit.tasks.preferences import REFERENCE_FREE, Preferences, Scores
from toolkit.tasks.question_answering import QuestionAnswering
from toolkit.tasks.seq2seq import Answering, PairBatch, Seq2Seq
from toolkit.tasks.speech import SpeechRecognition
from toolkit.tasks.tables import TableClassification, TableRegression, table_task
from toolkit.tasks.text_targets import PROBLEMS, MultiLabel, Regression, text_task
from toolkit.tasks.token_classification import TokenClassification

__all__ = [
    "PROBLEMS",
    "REFERENCE_FREE",
    "Answering",
    "Batch",
    "Classification",
    "Contrast",
    "ImageClassification",
    "LanguageModeling",
    "MultiLabel",
    "NextItem",
    "PairBatch",
    "Preferences",
    "QuestionAnswering",
    "Regression",
    "Scores",
    "Seq2Seq",
    "SpeechRecognition",
    "TableClassification",
    "TableRegression",
    "Task",
    "TokenClassification",
    "table_task",
    "text_task",
]
