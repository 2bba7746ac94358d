"""What the plan and the report say of tables and events, and examples of what `toolkit predict` reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from toolkit.config import EventsConfig, TableConfig
from toolkit.data.summary import report_of_examples
from toolkit.data.tables.events import Events
from toolkit.data.tables.prepare import TableData


def plan_of_table(data: TableData, config: TableConfig) -> dict[str, str]:
    """Lines of the plan: source, sizes, what each column is, what is missing or out of range."""
    facts, reading = data.facts, data.preprocessor
    scale = reading.scale
    if scale is None:
        target = f"{reading.target}, {len(reading.labels)} classes"
    else:
        target = f"{reading.target}, a measurement" + (
            ", learnt as log(1 + target)" if scale.transform != "none" else ""
        )
    words = {name: f"{name} ({len(known):,})" for name, known in reading.categories.items()}
    rows = {
        "source": config.name,
        "target": target,
        "rows": ", ".join(f"{count:,} {name}" for name, count in facts["samples"].items()) + _how_split(config),
        "dropped": ", ".join(f"{n:,} {why}" for why, n in facts["dropped"].items() if n) or "nothing",
    }
    for kind, title in (("numeric", "numbers"), ("boolean", "yes or no"), ("date", "dates")):
        if found := [name for name, its in reading.kinds.items() if its == kind]:
            rows[title] = ", ".join(found)
    if words:
        rows["categories"] = ", ".join(words.values())
    if facts["left_out"]:
        rows["left out"] = ", ".join(f"{name} ({why})" for name, why in facts["left_out"].items())
    whole = facts["training_rows"]
    made = {"fill": "filled", "drop": "whose rows are left out"}[config.missing]
    rows["empty cells"] = _shares(facts["missing"], whole, made) or "none in training"
    handled = {"keep": "kept", "clip": "moved to the fences", "drop": "whose rows are left out"}[config.outliers]
    rows["outliers"] = _shares(facts["outliers"], whole, handled) or "none in training"
    return rows


def report_of_table(data: TableData) -> dict[str, Any]:
    """The data's part of report.json."""
    facts = data.facts
    told = {key: facts[key] for key in ("counts", "missing", "outliers", "left_out", "training_rows")}
    return report_of_examples(data) | told | {"columns": data.preprocessor.kinds}


def share_of_majority(data: TableData) -> float | None:
    """Of the test's most frequent class: the accuracy of a constant answer; None of a measurement."""
    counts = data.facts["counts"].get("test", {}).values()
    return max(counts) / sum(counts) if counts else None


def example_row(data: TableData) -> str:
    """A row of the plainest values of each column, for the command line."""
    reading = data.preprocessor
    row: dict[str, Any] = {}
    for number in reading.numbers:
        kind = reading.kinds[number.column]
        if kind == "numeric":
            row[number.column] = int(number.fill) if number.fill.is_integer() else number.fill
        elif kind == "boolean":
            row[number.column] = bool(number.fill)
        elif number.name.endswith(" days"):
            row[number.column] = str(date(1970, 1, 1) + timedelta(days=number.fill))
    row |= {name: words[0] for name, words in reading.categories.items() if words}
    return shlex.quote(json.dumps({name: row[name] for name in reading.kinds if name in row}, ensure_ascii=False))


def plan_of_events(data: Events, config: EventsConfig) -> dict[str, str]:
    """Lines of the plan: source, sizes, what is held out and how it is ranked."""
    facts = data.facts
    unseen = f", {facts['untrained_items']:,} of which training does not see" if facts["untrained_items"] else ""
    return {
        "source": config.name,
        "events": f"{facts['events']:,} of {facts['users']:,} users and {facts['items']:,} items{unseen}",
        "dropped": ", ".join(f"{n:,} {why}" for why, n in facts["dropped"].items() if n) or "nothing",
        "samples": ", ".join(f"{count:,} {name}" for name, count in facts["samples"].items())
        + f", each of at most {config.max_length} items",
        "held out": "the last item of each user is the test, the one before it the validation",
        "ranked": "among all items" + (", without those that the user has had" if config.exclude_seen else ""),
    }


def report_of_events(data: Events) -> dict[str, Any]:
    """The data's part of report.json."""
    told = ("users", "items", "events", "untrained_items")
    return report_of_examples(data) | {key: data.facts[key] for key in told}


def example_history(data: Events) -> str:
    """The newest items of the first user of the test, for the command line."""
    items = [data.catalogue.items[number - 1] for number in data.test[0]["items"][-3:]]
    return shlex.quote(json.dumps({"items": items}, ensure_ascii=False))


def _how_split(config: TableConfig) -> str:
    if config.folds:
        return f"; the test is fold {config.fold} of {config.folds}"
    return f"; rows of one {config.group} stay together" if config.group else ""


def _shares(counts: Mapping[str, int], whole: int, made: str) -> str:
    told = ", ".join(f"{name} {count:,} ({count / whole:.2%})" for name, count in counts.items())
    return f"{told}: {made}" if told else ""
