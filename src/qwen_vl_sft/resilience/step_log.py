"""Log steps in the run folder: the rows of each step, if asked, and the skipped steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qwen_vl_sft.checkpointing.row_log import RowLog
from qwen_vl_sft.resilience.step_guard import StepGuard

SKIPPED = "skipped_steps.jsonl"


class StepLog(TrainerCallback):
    """Writes `skipped_steps.jsonl`, and `row_ids-RANK.jsonl` where row ids are logged, at the end of every step.

    Args:
        folder: the run folder.
        rank: of this process.
        guard: has the rows of the step and the skipped steps.
        row_ids: write the row ids of every step.
    """

    def __init__(self, folder: Path, rank: int, guard: StepGuard, row_ids: bool) -> None:
        self.folder, self.first, self.guard = folder, rank == 0, guard
        self.row_log = RowLog(folder, rank) if row_ids else None
        self._reported = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the rows of the step, and new skipped steps."""
        if self.row_log:
            self.row_log.write(state.global_step, self.guard.record.rows)
        for text in self.guard.skipped[self._reported :] if self.first else []:
            print(f"skipped: {text}", flush=True)
            with (self.folder / SKIPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "why": text}) + "\n")
        self._reported = len(self.guard.skipped)


def skipped_steps(folder: Path) -> int:
    """Return the number of skipped optimizer steps of a run."""
    path = folder / SKIPPED
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return len({json.loads(line)["step"] for line in lines})
