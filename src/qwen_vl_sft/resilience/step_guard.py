"""Watch every optimizer step: which rows it has, and whether its losses and its gradient are finite."""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.resilience.faults import StepRecord, describe_not_finite, not_finite_error


class StepGuard:
    """Keeps the record of the current step, and skips steps that are not finite if `skips` is set.

    Args:
        device: where the model computes.
        skips: skip steps whose loss or gradient is not finite; otherwise they end the run.
        can_skip: whether `nonfinite: skip` would work, which the error then offers.

    `skipped` describes each skipped step.
    """

    def __init__(self, device: torch.device, skips: bool = False, can_skip: bool = True) -> None:
        self.device = device
        self.skips = skips
        self.can_skip = can_skip
        self.record = StepRecord()
        self.skipped: list[str] = []
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
        """Note the gradient's norm; return whether the step should be skipped. All processes must call at once."""
        self.record.grad_norm = norm
        if accelerator.mixed_precision == "fp16":
            # A gradient scaler, DeepSpeed's or PyTorch's, skips steps whose gradient overflows in float16.
            self._overflows = (self._overflows + 1) * self.record.gradient_not_finite(self.device)
            self.record.overflows = self._overflows
        if not self.skips:
            return False
        skips = bool(accelerator.reduce(self.record.not_finite(self.device), reduction="sum").item())
        if skips:
            self.skipped.append(describe_not_finite(step, self.record))
        return skips

    def stop(self, step: int, record: StepRecord) -> None:
        """Raise `UserError` for a step that was not finite on any process. All processes must call at once."""
        raise not_finite_error(describe_not_finite(step, record), self.can_skip)
