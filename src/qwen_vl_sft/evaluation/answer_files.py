"""Answer files of a running evaluation: one file a process, one line a row, so that it can be resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.errors import UserError, shortened
from qwen_vl_sft.evaluation.scoring import REPORT_FILE, ROWS_FILE, SUMMARY_FILE
from qwen_vl_sft.inference.generation import GeneratedAnswer

# By arm and `row_id`; None for a row that could not be read.
Answers = Mapping[str, Mapping[int, GeneratedAnswer | None]]
PARTS_FOLDER = "parts"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class AnswerFiles:
    """The part files in `folder`. A line is `{"arm", "row_id", "answer", "ended"}`; without its newline it does not count.

    The answer to a row that could not be read is None, and `ended` is not there. What cannot be written raises `UserError`.
    """

    folder: Path

    def read(self) -> dict[str, dict[int, GeneratedAnswer | None]]:
        """Read the answers of all processes, by arm and row."""
        answers: dict[str, dict[int, GeneratedAnswer | None]] = {}
        for path in sorted(self.folder.glob(f"{PARTS_FOLDER}/*.jsonl")):
            for line in _whole_lines(path):
                entry = json.loads(line)
                text = entry["answer"]
                answer = None if text is None else GeneratedAnswer(text, entry["ended"])
                answers.setdefault(entry["arm"], {}).setdefault(entry["row_id"], answer)
        return answers

    def repair(self, rank: int) -> None:
        """Make this process's file ready to be appended to: cut off a line that a kill left unfinished."""
        path = self._path(rank)
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            if not content.endswith(b"\n"):
                path.write_bytes(content[: content.rfind(b"\n") + 1])

    def append(self, rank: int, arm: str, answers: Mapping[int, GeneratedAnswer | None]) -> None:
        """Add answers."""
        lines = []
        for row_id, answer in answers.items():
            entry = {"answer": answer.text, "ended": answer.ended} if answer else {"answer": None}
            lines.append(json.dumps({"arm": arm, "row_id": row_id, **entry}) + "\n")
        with self._writing(), open(self._path(rank), "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def read_settings(self) -> dict[str, Any]:
        """Read the settings of the evaluation in this folder; empty if there is none."""
        path = self.folder / SETTINGS_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            raise UserError(f"output_dir: {path} is damaged; start over with --overwrite") from None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Note what this run is about, for a later --resume."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def clear(self, *results: str) -> None:
        """Delete the part files, the settings, and the files of these names."""
        with self._writing():
            for path in self.folder.glob(f"{PARTS_FOLDER}/*.jsonl"):
                path.unlink()
            for name in (SETTINGS_FILE, *results):
                (self.folder / name).unlink(missing_ok=True)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing_to(self.folder, "free space and continue with --resume, or name another folder")

    def _path(self, rank: int) -> Path:
        return self.folder / PARTS_FOLDER / f"rank-{rank:05d}.jsonl"


def check_output_dir(folder: Path, in_use_allowed: bool) -> None:
    """Raise `UserError` for a folder with files that are not an evaluation's, or with an evaluation unless allowed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir: {folder} is a file; name a folder")
    foreign = [name for name, key in ((SUMMARY_FILE, "scores"), (SETTINGS_FILE, "arms")) if _lacks(folder / name, key)]
    if foreign:
        raise UserError(f"--output_dir: {folder} holds a {foreign[0]} that no evaluation wrote; name another folder")
    own = (SUMMARY_FILE, ROWS_FILE, REPORT_FILE, SETTINGS_FILE, PARTS_FOLDER)
    # Hidden files are those of a desktop or of a file system.
    held = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if held and not set(held) & set(own):
        names = shortened(", ".join(held[:3])) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise UserError(f"--output_dir: {folder} holds files that no evaluation wrote ({names}); name another folder")
    existing = [name for name in (SUMMARY_FILE, ROWS_FILE, SETTINGS_FILE, PARTS_FOLDER) if (folder / name).exists()]
    if existing and not in_use_allowed:
        raise UserError(
            f"--output_dir: {folder} holds an evaluation already ({', '.join(existing)}); continue it with --resume,"
            f" replace it with --overwrite, or name another folder"
        )


def _lacks(path: Path, key: str) -> bool:
    """Return whether this JSON file is not ours: ours all hold this key."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # missing, or half written by a process that was killed
        return False
    return not isinstance(content, dict) or key not in content


def deal(units: Sequence[Sequence[int]], done: Iterable[int], rank: int, processes: int) -> list[list[int]]:
    """Return the units of this process with the rows that are not done, longest first.

    Units are dealt in their order, each to the process with the fewest rows so far.
    """
    finished, counts = set(done), [0] * processes
    own: list[list[int]] = []
    for unit in units:
        rows = [row for row in unit if row not in finished]
        process = counts.index(min(counts))
        counts[process] += len(rows)
        if rows and process == rank:
            own.append(rows)
    return own


def different_settings(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe each setting that differs between two evaluations: `name: former, now current`."""
    names = sorted({*previous, *current})
    return [
        f"{name}: {previous.get(name)}, now {current.get(name)}"
        for name in names
        if previous.get(name) != current.get(name)
    ]


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
