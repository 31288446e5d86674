"""What a command says on stdout: words for people, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of a command, both ways, and its exit code."""

    data: Any
    text: str
    code: int = 0

    def show(self, as_json: bool) -> int:
        """Prints it, and returns the exit code."""
        print(json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) if as_json else self.text)
        return self.code


def table(rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Rows in columns, the first row a heading; all but the first column are set to the right where they are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numbers and column else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows)
