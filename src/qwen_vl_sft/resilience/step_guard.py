"""Watch every optimizer step: which rows it has, and whether its losses and its gradient are finite."""

from __future__ import annotations

import math
from typing import Any

import torch

from qwen_vl_sft.resilience.faults import StepRecord, describe_not_finite, endless_error, not_finite_error

# Steps in a row that `nonfinite: skip` skips: a diverged run would go on to its end without learning.
MOST_SKIPPED = 16


class StepGuard:
    """Keeps the record of the current step, and skips steps that are not finite if `skips` is set.

    Args:
        device: where the model computes.
        skips: skip steps whose loss or gradient is not finite; otherwise they end the run.
        can_skip: whether `nonfinite: skip` would work, which the error then offers.

    `skipped` describes each skipped step; `skipped_loss` is the sum of their finite losses.
    """

    def __init__(self, device: torch.device, skips: bool = False, can_skip: bool = True) -> None:
        self.device = device
        self.skips = skips
        self.can_skip = can_skip
        self.record = StepRecord()
        self.skipped: list[str] = []
        self.skipped_loss = 0.0
        self._in_a_row = 0
        self._averaged_skips, self._averaged_loss = 0, 0.0
        self._overflows = torch.zeros((), device=device)

    def begin(self, rows: list[list[int]]) -> None:
        """Begin a step with the row ids of each of its micro-batches."""
        self.record = StepRecord(rows)

    def row_ids(self) -> list[int]:
        """Return the row ids of the step."""
        return [row for rows in self.record.rows for row in rows]

    def next_rows(self) -> list[int]:
        """Return the row ids of the micro-batch that comes next."""
        place = len(self.record.losses)
        return self.record.rows[place] if place < len(self.record.rows) else []

    def note_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Note the loss of a micro-batch; return it as it is logged: 0 for a loss that is skipped."""
        self.record.losses.append(loss.detach())
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.skips else loss

    def should_skip(self, step: int, norm: Any, accelerator: Any) -> bool:
        """Note the gradient's norm; return whether the step should be skipped. All processes must call at once.

        Raises `UserError` for the last of `MOST_SKIPPED` such steps in a row.
        """
        self.record.grad_norm = norm
        if accelerator.mixed_precision == "fp16":
            # A gradient scaler, DeepSpeed's or PyTorch's, skips steps whose gradient overflows in float16.
            self._overflows = (self._overflows + 1) * self.record.gradient_not_finite(self.device)
            self.record.overflows = self._overflows
        if not self.skips:
            return False
        if not accelerator.reduce(self.record.not_finite(self.device), reduction="sum").item():
            self._in_a_row = 0
            return False
        described = describe_not_finite(step, self.record)
        self.skipped.append(described)
        self._in_a_row += 1
        if self._in_a_row == MOST_SKIPPED:
            raise endless_error(described, MOST_SKIPPED)
        # The Trainer adds up the mean over processes.
        finite = [torch.nan_to_num(loss, 0.0, 0.0, 0.0).float() for loss in self.record.losses]
        own = torch.stack(finite).sum() if finite else torch.zeros((), device=self.device)
        self.skipped_loss += accelerator.reduce(own, reduction="mean").item()
        return True

    def mean_loss(self, loss: float, steps: int) -> float:
        """Return the mean loss of a log without its skipped steps, which the Trainer counts; NaN if all were skipped.

        Args:
            loss: the Trainer's mean over all steps since the last log.
            steps: how many those are.
        """
        skips, lost = len(self.skipped) - self._averaged_skips, self.skipped_loss - self._averaged_loss
        self._averaged_skips, self._averaged_loss = len(self.skipped), self.skipped_loss
        if not skips:
            return loss
        return (loss * steps - lost) / (steps - skips) if steps > skips else math.nan

    def stop(self, step: int, record: StepRecord) -> None:
        """Raise `UserError` for a step that was not finite on any process. All processes must call at once."""
        raise not_finite_error(describe_not_finite(step, record), self.can_skip)
