"""Settings of speech: the recordings, what they say, and how they are varied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from toolkit.config.sections import Natural, SourcesConfig


@dataclass(frozen=True)
class SpeechConfig(SourcesConfig):
    """Recordings and what is said in them: where they are, how they are split and varied."""

    name: tuple[str, ...] = ("sample:asterisk-prompts",)
    """One source or several: `sample:NAME`; a file or glob (CSV, TSV, JSONL, JSON, Parquet) of which a row names a
    recording and has its text; or a folder of recordings, each with its text beside it in a .txt file of its name."""
    audio: str = "audio"
    """Column that names the recording: a path, from the folder of the file on."""
    text: str = "text"
    """Column that holds what is said."""
    language: str | None = None
    """Language of the recordings, as `en` or `zh`, for a model that knows several."""
    max_seconds: Annotated[int, Field(ge=1, le=30, strict=True)] = 30
    """Longest recording. The model hears all of them in a window of this length: a shorter one is much less work, and
    is kept by the model that is saved. Rows with longer ones are unfit."""
    time_masks: Natural = 2
    """Stretches of time that are blanked out of each training clip, anew in each epoch (SpecAugment)."""
    time_mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Longest of these, as a share of the clip."""
    mel_masks: Natural = 2
    """Bands of frequencies that are blanked out of each training clip."""
    mel_mask_bands: Annotated[int, Field(ge=1, strict=True)] = 10
    """Widest of these, in mel bands, of which most models have 80."""
