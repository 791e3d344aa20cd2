"""Score answers that another program wrote to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError, quoted, raise_all
from qwen_vl_sft.evaluation.box_metrics import BoxTarget
from qwen_vl_sft.evaluation.scoring import ALL, SPLIT_COLUMN, Question, score_row, split_name, summarise

ARM = "predictions"
TARGET_KEYS = ("answer", "label")
SPLIT_KEYS = ("split", SPLIT_COLUMN)
FORM = (
    'a row is {"prediction": text, "answer" or "label": text or list of texts}, and may have split or human_or_machine;'
    ' for boxes "bbox": [[x1, y1, x2, y2], ...] in the coordinates of the prediction, with or without an answer'
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
    boxes = _boxes(entry.get("bbox"))
    given = [key for key in TARGET_KEYS if key in entry]
    if len(given) > 1 or not (given or boxes):
        raise ValueError(f"has {'both answer and label' if given else 'neither answer nor label'}")
    target = entry[given[0]] if given else ", ".join(str(list(box.numbers)) for box in boxes)
    targets = [_text(text, given[0]) for text in target] if isinstance(target, list) else [_text(target, "answer")]
    if not targets:
        raise ValueError(f"has an empty list as {given[0]}")
    splits = [entry[key] for key in SPLIT_KEYS if entry.get(key) is not None]
    if len(splits) > 1:
        raise ValueError("has both split and human_or_machine")
    if splits == [ALL]:
        raise ValueError(f"has split {quoted(ALL)}, the name for all rows together")
    split = split_name(splits[0] if splits else None)
    question = Question(row_id, str(entry.get("question", "")), targets, split, boxes)
    return score_row(question, {ARM: _text(entry["prediction"], "prediction")})


def _boxes(value: Any) -> tuple[BoxTarget, ...]:
    """Return boxes as targets; the size of their image is not known, and not needed for boxes."""
    if value is None:
        return ()
    for box in value if isinstance(value, list) and value else [value]:
        numbers = box if isinstance(box, list) and len(box) == 4 else [None]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise ValueError(f"has a bbox that is no list of boxes of four numbers: {quoted(value)}")
    return tuple(BoxTarget(tuple(box), (1.0, 1.0)) for box in value)


def _text(value: Any, name: str) -> str:
    """Return a text as it is, a number as Python writes it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"has a {name} that is neither text nor a number: {quoted(value)}")
    return str(value)
