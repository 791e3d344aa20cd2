"""Score answers that another program wrote to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError, quoted, raise_all
from qwen_vl_sft.evaluation.scoring import ALL, SPLIT_COLUMN, Question, score_row, split_name, summarise

ARM = "predictions"
TARGET_KEYS = ("answer", "label")
SPLIT_KEYS = ("split", SPLIT_COLUMN)
FORM = (
    'a row is {"prediction": text, "answer" or "label": text or list of texts}, and may have split or human_or_machine'
)
PROBLEMS_SHOWN = 5


def score_predictions(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the scored rows and summary of a file: JSONL, or JSON with a list. Raises `UserError` with the bad rows."""
    rows, problems = [], []
    for row_id, (where, entry) in enumerate(_entries(path)):
        try:
            rows.append(_score_entry(row_id, entry))
        except ValueError as error:
            problems.append(f"{where}: {error}; {FORM}")
    if len(problems) > PROBLEMS_SHOWN:
        more = len(problems) - PROBLEMS_SHOWN
        problems = [*problems[:PROBLEMS_SHOWN], f"{path}: {more} more rows like these"]
    raise_all(problems)
    if not rows:
        raise UserError(f"predictions: {path} holds no rows; {FORM}")
    return rows, {"predictions": str(path), **summarise(rows, [ARM])}


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Return the rows of the file, each with its location for messages."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UserError(f"predictions: {path} cannot be read: {reason}; give a JSONL or JSON file") from None
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise UserError(f"predictions: {path} is not JSON: {error}; {FORM}") from None
        yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(listed))
        return
    # Not splitlines: a line separator may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: is not JSON ({error}); {FORM}") from None


def _score_entry(row_id: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"is a {type(entry).__name__}, not an object")
    if "prediction" not in entry:
        raise ValueError("has no prediction")
    given = [key for key in TARGET_KEYS if key in entry]
    if len(given) != 1:
        raise ValueError(f"has {'both answer and label' if given else 'neither answer nor label'}")
    target = entry[given[0]]
    targets = [_text(text, given[0]) for text in (target if isinstance(target, list) else [target])]
    if not targets:
        raise ValueError(f"has an empty list as {given[0]}")
    splits = [entry[key] for key in SPLIT_KEYS if entry.get(key) is not None]
    if len(splits) > 1:
        raise ValueError("has both split and human_or_machine")
    if splits == [ALL]:
        raise ValueError(f"has split {quoted(ALL)}, the name for all rows together")
    question = Question(row_id, str(entry.get("question", "")), targets, split_name(splits[0] if splits else None))
    return score_row(question, {ARM: _text(entry["prediction"], "prediction")})


def _text(value: Any, name: str) -> str:
    """Return a text as it is, a number as Python writes it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"has a {name} that is neither text nor a number: {quoted(value)}")
    return str(value)
