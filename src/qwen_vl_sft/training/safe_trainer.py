"""TRL's trainer whose steps and saves can be trusted: faults are told with the rows they happened on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES
from qwen_vl_sft.resilience.faults import (
    StepRecord,
    describe_micro_batch,
    describe_step,
    describe_unsound,
    explained_out_of_memory,
    unsound_error,
)
from qwen_vl_sft.training.saving_trainer import SavingTrainer, Stage

ROW_IDS = "row_ids"


class SafeTrainer(SavingTrainer):
    """What `VisionSFTTrainer` builds on. Batches carry the ids of their rows under `row_ids`, a list of numbers.

    `skip_unsound` leaves steps out whose loss or gradient is not finite, and `skipped` tells of each. `failed_loggers`
    tells why, by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_unsound = False
        self.skipped: list[str] = []
        self.failed_loggers: dict[str, str] = {}
        self.record = StepRecord()
        self._overflows = torch.zeros((), device=self.args.device)
        self._after_loss: tuple[Any, ...] | None = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step; their row ids are taken out and kept."""
        step = self.state.global_step + 1
        self.tell(f"step {step}, waiting for its data", step, Stage.DATA)
        steps, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch for step in steps for batch in step.get(MICRO_BATCHES, [step])]
        self.record = StepRecord([batch.pop(ROW_IDS, []) for batch in batches])
        return steps, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if batch_samples and "input_ids" in batch_samples[0]:
            step = self.state.global_step + 1
            rows = [row for batch in batch_samples for row in batch.get(ROW_IDS, [])]
            rows = rows or [row for rows in self.record.rows for row in rows]
            batch = describe_step(rows, batch_samples)
            self.tell(f"step {step}, adding up the learned tokens of all processes: {batch}", step, Stage.TOKENS)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward over a micro-batch."""
        place = len(self.record.losses)
        rows = self.record.rows[place] if place < len(self.record.rows) else []
        batch = describe_micro_batch(rows, inputs)
        step, number = self.state.global_step + 1, f"{place + 1} of {len(self.record.rows)}"
        self.tell(f"step {step}, forward of micro-batch {number}: {batch}", step, Stage.MICRO_BATCHES, 2 * place)
        packing = "cu_seq_lens_q" in inputs
        backward = f"step {step}, backward of micro-batch {number}: {batch}"
        self._after_loss = (backward, step, Stage.MICRO_BATCHES, 2 * place + 1)
        with explained_out_of_memory(batch, packing, bool(self.args.activation_checkpointing)):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.record.losses.append(loss.detach())
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self.skip_unsound else loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """In a training step, notes its end: the Trainer goes on with the backward pass, where processes wait."""
        stack = super().compute_loss_context_manager()
        if self._after_loss:
            stack.callback(self.tell, *self._after_loss)
            self._after_loss = None
        return stack

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        step = self.state.global_step + 1
        self.tell(f"step {step}, norm of its gradient", step, Stage.GRADIENT)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.record.grad_norm = norm
        if self.accelerator.mixed_precision == "fp16":
            # A gradient scaler, DeepSpeed's or PyTorch's, leaves out steps whose gradient overflows in float16.
            self._overflows = (self._overflows + 1) * self.record.overflow(self.args.device)
            self.record.overflows = self._overflows
        if self.skip_unsound:
            unsound = self.accelerator.reduce(self.record.unsound(self.args.device), reduction="sum")
            if unsound.item():
                self.skipped.append(describe_unsound(step, self.record))
                # Without gradients the optimizer changes neither weights nor its own state.
                model.zero_grad(set_to_none=True)
        return norm

    def stop_if_unsound(self, step: int, record: StepRecord) -> None:
        """Raise `UserError` for a step that was not finite on any process. All processes must call at once."""
        described = describe_unsound(step, record)
        raise unsound_error(described, can_skip=not self.is_deepspeed_enabled)
