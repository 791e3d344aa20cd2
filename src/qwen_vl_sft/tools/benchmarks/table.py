"""Results as a table: Markdown that is also legible on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEXT = "{}"  # the style of a column of words, which stands left; numbers stand right


def format_table(results: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A row a result; `columns` maps a result's key to its label and style. A column without any value is left out."""
    shown = {name: column for name, column in columns.items() if any(_cell(result, name, "{}") for result in results)}
    rows = [[label for label, _ in shown.values()]]
    rows += [[_cell(result, name, style) for name, (_, style) in shown.items()] for result in results]
    widths = [max(3, *(len(row[place]) for row in rows)) for place in range(len(shown))]
    left = [style == TEXT for _, style in shown.values()]
    rules = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, left, strict=True)]
    padded = [
        [cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(row, widths, left, strict=True)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rules, *padded[1:]])


def _cell(result: Mapping[str, Any], name: str, style: str) -> str:
    value = result.get(name)
    return "" if value is None else style.format(value)
