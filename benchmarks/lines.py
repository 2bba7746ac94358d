"""A result as a line of JSON: on the screen, and in a file where one was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_line(result: Mapping[str, Any], path: Path | None) -> None:
    """Print it, and append it to the file."""
    line = json.dumps(result)
    print(line)
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
