"""What kinds of models a run can leave, how each is known, and what `toolkit predict` gives to it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from toolkit.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        about: what it is, for people: "a classifier".
        architectures: how the names of its classes end.
        answerer: `module:Class` of an `Answerer`, imported when it is needed. On the command line classifiers have
            a table of their own.
        reads: what it answers to: texts, files (images, recordings), or rows of named values.
        options: those of the command that only some kinds read, and this one does.
        tokenizer: whether one lies beside it.
        suffixes: of those files that it answers to in a folder.
    """

    about: str
    architectures: tuple[str, ...]
    answerer: str
    reads: Literal["texts", "files", "rows"] = "texts"
    options: frozenset[str] = frozenset()
    tokenizer: bool = True
    suffixes: tuple[str, ...] = ()


CLASSIFIER = Kind(
    "a classifier",
    ("ForSequenceClassification",),
    options=frozenset({"top", "max_length"}),
    answerer="toolkit.predict.scorer:Scorer",
)
WRITER = Kind(
    "a language model, which goes on with texts",
    ("ForCausalLM", "LMHeadModel"),
    options=frozenset({"tokens", "temperature", "plain"}),
    answerer="toolkit.predict.writer:WriterAnswers",
)
SPEECH = Kind(
    "a model of speech, which writes what is said in files",
    ("WhisperForConditionalGeneration",),
    reads="files",
    answerer="toolkit.predict.speech:SpeechAnswers",
)
TAGGER = Kind(
    "a tagger, which marks names in texts",
    ("ForTokenClassification",),
    options=frozenset({"max_length"}),
    answerer="toolkit.predict.tagger:Tagger",
)
READER = Kind(
    "a reader, which finds answers in passages",
    ("ForQuestionAnswering",),
    reads="rows",
    options=frozenset({"max_length"}),
    answerer="toolkit.predict.reader:Reader",
)
SCORER = Kind(
    "a model that gives a text several labels or a number, or reads pairs of texts",
    (),
    options=frozenset({"max_length"}),
    answerer="toolkit.predict.scorer:Scorer",
)
"""Of the same classes as `CLASSIFIER`: told apart by the configuration of the model or of the run."""
TRANSLATOR = Kind(
    "an encoder–decoder, which writes a text for each",
    ("ForConditionalGeneration", "MTModel"),
    options=frozenset({"tokens", "max_length"}),
    answerer="toolkit.predict.translator:Translator",
)
TABLE = Kind(
    "a network of tables",
    ("ForTables",),
    reads="rows",
    options=frozenset({"top"}),
    tokenizer=False,
    answerer="toolkit.predict.rows:TableAnswers",
)
NEXT_ITEM = Kind(
    "a network that foresees the next item",
    ("ForNextItem",),
    reads="rows",
    options=frozenset({"top"}),
    tokenizer=False,
    answerer="toolkit.predict.rows:NextItemAnswers",
)
ENCODER = Kind(
    "an encoder, which gives the vectors of texts",
    ("Model",),
    options=frozenset({"max_length"}),
    answerer="toolkit.predict.encoder:EncoderAnswers",
)
IMAGES = Kind(
    "a classifier of images",
    ("ForImageClassification",),
    reads="files",
    options=frozenset({"top"}),
    tokenizer=False,
    answerer="toolkit.predict.images:ImageAnswers",
    suffixes=(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
KINDS: tuple[Kind, ...] = (
    CLASSIFIER,
    WRITER,
    TAGGER,
    READER,
    SCORER,
    TABLE,
    NEXT_ITEM,
    SPEECH,
    ENCODER,
    IMAGES,
    TRANSLATOR,  # behind all whose names end as its own do
)
"""All that are known; of several that a name fits, the first counts."""


@dataclass(frozen=True)
class Answer:
    """What a model says of one input.

    Attributes:
        shown: for a reader; may have several lines.
        fields: for JSON, and, where each is one word or number, for a table.
    """

    shown: str
    fields: Mapping[str, Any]


class Answerer(Protocol):
    """A saved model that is ready. The class is called with a `SavedModel`, and `device` and its options by name."""

    def stream(self, inputs: Iterable[Any], *, batch: int) -> Iterator[Sequence[Answer]]:
        """Answers in the order of the inputs, window by window."""


def kind_of(architecture: str) -> Kind | None:
    """The kind of a class of models; None where there is none."""
    return next((kind for kind in KINDS if kind.architectures and architecture.endswith(kind.architectures)), None)


def load_answerer(kind: Kind, saved: Any, **options: Any) -> Answerer:
    """A `SavedModel`, ready to answer; its libraries are imported here."""
    module, name = kind.answerer.split(":")
    answerer: Answerer = getattr(importlib.import_module(module), name)(saved, **options)
    return answerer


def check_options(kind: Kind, given: Iterable[str]) -> None:
    """Raises ConfigError where an option (of those that only some kinds read) has no effect on this kind."""
    for name in given:
        if name not in kind.options:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect on {kind.about}", "Drop it.")
