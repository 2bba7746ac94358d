"""The sections of recipes that learn from tables: of measurements, and of events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.sections import Count, Natural, Positive

MISSING_VALUES = ("", "NA", "N/A", "NaN", "nan", "null", "NULL")


@dataclass(frozen=True)
class TableConfig:
    """A table: where it is, which column is predicted, how the others are read, and how its rows are split."""

    name: str = "sample:diamonds"
    """`sample:NAME`, or a file, folder or glob (CSV, TSV, JSONL, JSON, Parquet)."""
    target: str = "price"
    """Column that is to be predicted."""
    task: Literal["auto", "regression", "classification"] = "auto"
    """Whether the target is a measurement or a class. `auto` takes words, and up to 20 different whole numbers, for
    classes."""
    numeric: tuple[str, ...] = ()
    """Columns to be read as numbers, whatever they look like."""
    categorical: tuple[str, ...] = ()
    """Columns to be read as words of which each is a category, as a postcode."""
    boolean: tuple[str, ...] = ()
    """Columns to be read as yes or no (true, false, t, f, yes, no, y, n, 1, 0)."""
    dates: tuple[str, ...] = ()
    """Columns to be read as dates (2026-11-28, 2026/11/28, with a time or without), of which year, month, day, weekday,
    hour and the days since 1970 are learnt from."""
    drop: tuple[str, ...] = ()
    """Columns to be left out."""
    missing_values: tuple[str, ...] = MISSING_VALUES
    """What stands in a cell that is empty."""
    missing: Literal["fill", "drop"] = "fill"
    """What becomes of empty cells. `fill`: a number is the median of the training rows, with a mark that it was missing
    where training rows have such; a category is one of its own. `drop`: the row is left out."""
    outliers: Literal["keep", "clip", "drop"] = "keep"
    """What becomes of numbers beyond the fences: `clip` moves them there, `drop` leaves the row out of training."""
    fence: Positive = 3.0
    """A number is an outlier that lies so many interquartile ranges of the training rows beyond a quartile."""
    scaling: Literal["standard", "quantile"] = "quantile"
    """Numbers are brought to mean 0 and deviation 1: `standard` as they are, `quantile` by their rank, to a normal
    distribution, so that no outlier stands out."""
    target_transform: Literal["auto", "none", "log1p"] = "auto"
    """`log1p` learns the logarithm of 1 + target; `auto` does where that makes a skewed target less so. Figures are
    always in the target's own units."""
    rare: Annotated[int, Field(ge=1, strict=True)] = 5
    """Categories of fewer training rows are read as unknown, which is how those that come later are read."""
    validation: str | None = None
    """File, folder or glob with the validation split. Without it a share of the table is taken."""
    test: str | None = None
    """File, folder or glob with the test split. Without it a share of the table is taken."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out for validation where no validation split is given."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out for the test where no test split is given and there are no folds."""
    split: Literal["auto", "random", "stratified"] = "auto"
    """`stratified` keeps the shares of the classes; `auto` does for classes. Equal rows are never parted."""
    group: str | None = None
    """Column whose equal values stay together in one split, as a patient; it is not learnt from."""
    folds: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Cross-validation: cut the rows into so many folds, of which `fold` is the test. It stands in the place of
    `test_share`."""
    fold: Natural = 0
    """Which fold is the test, from 0."""
    train_rows: Count | None = None
    """Use at most so many training rows."""
    split_seed: Natural = 0
    """Seed of the splits, apart from the run's seed, so that runs with other seeds are tested alike."""
    workers: Natural | None = None
    """Processes that collate batches beside the training process; 0 collates in it. By default 1 for a GPU, 0 for a
    CPU."""
    max_bad_rows: Natural = 100
    """Rows that may be unfit (without a target, or with a word where a number should stand) and are left out, before
    the run stops."""


@dataclass(frozen=True)
class TableNetworkConfig:
    """The network that reads a row of a table."""

    architecture: Literal["mlp", "ft_transformer"] = "mlp"
    """`mlp`: residual blocks over all values at once. `ft_transformer`: each value a token, with attention among them
    (Gorishniy et al. 2021)."""
    layers: Count = 2
    """Blocks."""
    hidden_size: Count = 128
    """Width of the blocks."""
    heads: Count | None = None
    """Attention heads, of `ft_transformer` (default 8)."""
    embedding_size: Count | None = None
    """Width of what a number or category becomes before the blocks, of `mlp` (default 16)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability within the blocks."""


@dataclass(frozen=True)
class EventsConfig:
    """What users have done, in the order of time: where it is, and what of it is held out."""

    name: str = "sample:movielens"
    """`sample:NAME`, or a file, folder or glob (CSV, TSV, JSONL, JSON, Parquet) with an event a row."""
    user: str = "user"
    """Column that says who."""
    item: str = "item"
    """Column that says what."""
    timestamp: str = "timestamp"
    """Column that says when, as a number or a date. Events of one moment stay in the order of the rows."""
    title: str = "title"
    """Column with the item's name for people, where there is one."""
    missing_values: tuple[str, ...] = MISSING_VALUES
    """What stands in a cell that is empty."""
    min_events: Annotated[int, Field(ge=3, strict=True)] = 5
    """Users with fewer events are left out."""
    min_item_events: Count = 1
    """Items with fewer events are left out, and their events, before users are counted."""
    max_length: Annotated[int, Field(ge=2, strict=True)] = 50
    """Events that the network looks back on. A longer history is several training samples."""
    exclude_seen: bool = True
    """Rank only items that the user has not had yet, as is right for films. False where they come back, as songs do."""
    workers: Natural | None = None
    """Processes that collate batches beside the training process; 0 collates in it. By default 1 for a GPU, 0 for a
    CPU."""
    max_bad_rows: Natural = 100
    """Rows that may be unfit (without user, item or time) and are left out, before the run stops."""


@dataclass(frozen=True)
class NextItemNetworkConfig:
    """The network that foresees the next item: a small causal Transformer over those before it."""

    layers: Count = 2
    """Blocks."""
    hidden_size: Count = 64
    """Width, and that of an item's embedding."""
    heads: Count = 2
    """Attention heads of a block."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout probability of embeddings, attention and blocks."""
