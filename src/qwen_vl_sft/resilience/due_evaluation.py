"""Track an evaluation that was postponed until after a checkpoint, so that the resumed run can do it."""

from __future__ import annotations

from typing import Any


class DueEvaluation:
    """Knows whether an evaluation is due.

    Args:
        args: the trainer's arguments.
        due: the run resumes from a checkpoint after which an evaluation was due.
    """

    def __init__(self, args: Any, due: bool = False) -> None:
        self.args = args
        self.due = due
        self._evaluated_step: int | None = None

    def comes_at_epoch_end(self, state: Any) -> bool:
        """Return whether the step that has ended is the last of an epoch, or of the run, with its evaluation to come.

        The Trainer announces it only when the step is logged and saved.
        """
        epoch = state.epoch or 0.0
        ends = state.global_step >= state.max_steps or abs(epoch - round(epoch)) < 1e-9
        wanted = self.args.eval_strategy == "epoch" and self.args.eval_delay <= epoch
        return ends and wanted and self._evaluated_step != state.global_step

    def postpone(self, due: bool = True) -> None:
        """Postpone an evaluation: the run that resumes from the next checkpoint does it."""
        self.due = due

    def take_pending(self) -> bool:
        """Return whether a postponed evaluation must run now; it is no longer pending afterwards."""
        due, self.due = self.due, False
        return due and self.args.eval_strategy != "no"

    def note(self, step: int) -> None:
        """Note that the model was evaluated after a step."""
        self._evaluated_step = step
