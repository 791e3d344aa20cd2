"""`log_row_ids: true`: record the rows of each optimizer step, to prove that a resume changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "row_ids-{rank}.jsonl"
PATTERN = "row_ids-*.jsonl"


class RowLog:
    """Writes a line a step for one process: `{"step": 3, "rows": [[ids of a micro-batch], ...]}`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / NAME.format(rank=rank)

    def write(self, step: int, rows: list[list[int]]) -> None:
        """Add a step. The file is closed again, so that a kill costs one line at most."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")


def forget_after(folder: Path, step: int, pattern: str = PATTERN) -> None:
    """Remove from the files of all processes the steps after the checkpoint that a run resumes from."""
    for path in folder.glob(pattern):
        kept = [line for line, entry in _lines(path) if entry["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def read_row_log(folder: Path) -> dict[int, list[int]]:
    """Return the row ids of every step over all processes, in the order of the epoch for padded batches.

    That order is by micro-batch and then by process. Raises `ValueError` when a process has a step twice.
    """
    files = [dict(_steps(path)) for path in sorted(folder.glob(PATTERN), key=lambda path: int(path.stem[8:]))]
    found: dict[int, list[int]] = {}
    for step in sorted({step for file in files for step in file}):
        parts = [file[step] for file in files if step in file]
        depth = max(map(len, parts))
        found[step] = [row for place in range(depth) for part in parts if place < len(part) for row in part[place]]
    return found


def _steps(path: Path) -> list[tuple[int, list[list[int]]]]:
    steps = [(entry["step"], entry["rows"]) for _, entry in _lines(path)]
    if len({step for step, _ in steps}) != len(steps):
        raise ValueError(f"{path} has a step twice")
    return steps


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Yield lines with their entries; the last one may have been cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append((line, json.loads(line)))
        except ValueError:
            continue
    return found
