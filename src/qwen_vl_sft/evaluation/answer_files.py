"""Answers on disk while an evaluation runs: one file a process, one line a row, so that a killed run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.generated_answer import GeneratedAnswer

PARTS_FOLDER = "parts"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class AnswerFiles:
    """The part files in `folder`. A line is `{"arm", "row_id", "answer", "ended"}`; without its newline it does not count.

    The answer to a row that could not be read is None, and `ended` is not there.
    """

    folder: Path

    def read(self) -> dict[str, dict[int, GeneratedAnswer | None]]:
        """All answers there are, by arm and row, whichever process wrote them."""
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
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])

    def append(self, rank: int, arm: str, answers: Mapping[int, GeneratedAnswer | None]) -> None:
        """Add the answers of a batch."""
        lines = []
        for row_id, answer in answers.items():
            said = {"answer": answer.text, "ended": answer.ended} if answer else {"answer": None}
            lines.append(json.dumps({"arm": arm, "row_id": row_id, **said}) + "\n")
        with open(self._path(rank), "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def read_settings(self) -> dict[str, Any]:
        """What the run that left its files here was about; empty when there is none."""
        path = self.folder / SETTINGS_FILE
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            raise UserError(f"output_dir: {path} is damaged; start anew with --overwrite") from None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Note what this run is about, for a later --resume."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Delete the part files and settings."""
        for path in self.folder.glob(f"{PARTS_FOLDER}/*.jsonl"):
            path.unlink()
        (self.folder / SETTINGS_FILE).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        return self.folder / PARTS_FOLDER / f"rank-{rank:05d}.jsonl"


def deal(batches: Sequence[Sequence[int]], done: Iterable[int], rank: int, processes: int) -> list[list[int]]:
    """The batches of this process: every batch with a row that is not done, dealt in turn, longest first.

    Whole batches are dealt, the same ones whatever the number of processes and however much is done, because the
    answers in 16 bits may depend on what stands beside a row in its batch.
    """
    finished = set(done)
    open_batches = [list(batch) for batch in batches if not finished.issuperset(batch)]
    return open_batches[rank::processes]


def different_settings(former: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One text for each setting in which a run cannot go on from another: `name: former, now current`."""
    names = sorted({*former, *current})
    return [
        f"{name}: {former.get(name)}, now {current.get(name)}"
        for name in names
        if former.get(name) != current.get(name)
    ]


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
