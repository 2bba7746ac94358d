"""Tables: rows of named values, from wherever they lie to what a network reads; and events as sequences of items."""

from toolkit.data.tables.events import Catalogue, Events, events
from toolkit.data.tables.prepare import TableData, table
from toolkit.data.tables.preprocess import Preprocessor
from toolkit.data.tables.target import TargetScale

__all__ = ["Catalogue", "Events", "Preprocessor", "TableData", "TargetScale", "events", "table"]
