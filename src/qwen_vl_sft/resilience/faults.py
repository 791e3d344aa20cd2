"""Detect NaN and out-of-memory errors; say which rows caused them and what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from qwen_vl_sft.errors import UserError, first_line

_SHOWN = 64
# Most steps in a row that a gradient scaler may skip. It halves its scale at each: from 65,536, where PyTorch's and
# DeepSpeed's begin, to 1, below which the loss scale is not what makes a gradient infinite.
_MOST_OVERFLOWS = 16


@dataclass
class StepRecord:
    """One optimizer step of this process: the rows of its micro-batches, their losses, and whether all were finite.

    `overflows` is how many steps in a row, including this one, the gradient scaler has skipped; None without a scaler.
    """

    rows: list[list[int]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norm: torch.Tensor | float | None = None
    overflows: torch.Tensor | None = None

    def not_finite(self, device: torch.device) -> torch.Tensor:
        """Return 1 when a loss or the gradient is NaN or infinite, else 0, without waiting for the device.

        A gradient scaler searches for the largest scale, so with one some infinite gradients in a row are normal.
        """
        faults = [1 - torch.isfinite(loss).float() for loss in self.losses]
        faults.append(
            self.gradient_not_finite(device) if self.overflows is None else (self.overflows >= _MOST_OVERFLOWS).float()
        )
        return torch.stack(faults).max()

    def gradient_not_finite(self, device: torch.device) -> torch.Tensor:
        """Return 1 when the gradient is NaN or infinite, else 0, without waiting for the device."""
        if self.grad_norm is None:
            return torch.zeros((), device=device)
        norm = self.grad_norm.full_tensor() if hasattr(self.grad_norm, "full_tensor") else self.grad_norm
        return 1 - torch.isfinite(torch.as_tensor(norm, device=device).reshape(())).float()

    def culprits(self) -> dict[str, Any]:
        """Return this process's rows, the rows of micro-batches whose loss is not finite, and the gradient norm."""
        bad = [rows for rows, loss in zip(self.rows, self.losses, strict=False) if not torch.isfinite(loss)]
        norm = self.grad_norm
        return {
            "rows": [row for rows in self.rows for row in rows],
            "bad": [row for rows in bad for row in rows],
            "has_bad": bool(bad),
            "grad_norm": float(norm) if norm is not None else None,
            "overflows": None if self.overflows is None else int(self.overflows),
        }


def describe_not_finite(step: int, record: StepRecord) -> str:
    """Describe what is NaN or infinite in a step, with row ids. All processes must call at once."""
    parts = gather_object([record.culprits()])
    rows = [row for part in parts for row in part["rows"]]
    bad = [row for part in parts for row in part["bad"]]
    if any(part["has_bad"] for part in parts):
        what = f"the loss of row(s) {_listed(bad)} is NaN or infinite"
    else:
        what = f"the gradient is NaN or infinite (norm {parts[0]['grad_norm']}) though every loss is finite"
        if parts[0]["overflows"] is not None:
            what += f", and so it was in {parts[0]['overflows']} steps in a row, with a smaller loss scale each time"
    return f"step {step}: {what}. The rows (row_id) of the step: {_listed(rows)}"


def not_finite_error(described: str, can_skip: bool) -> UserError:
    """Build the error that ends a run for a NaN."""
    skip = ", or set nonfinite: skip to leave such steps out" if can_skip else ""
    return UserError(
        f"{described}. Nothing was saved after it; look at these rows, lower learning_rate, raise warmup_steps{skip}."
        f" Resume from the last checkpoint with --resume_from_checkpoint latest"
    )


def endless_error(described: str, steps: int) -> UserError:
    """Build the error that ends a run whose last `steps` steps were all skipped."""
    return UserError(
        f"{described}. It is the last of {steps} steps in a row that nonfinite: skip skipped, so nothing is learned any more;"
        f" look at these rows, lower learning_rate, or raise warmup_steps. Resume from an earlier checkpoint with"
        f" --resume_from_checkpoint FOLDER"
    )


def describe_micro_batch(rows: list[int], inputs: dict[str, Any]) -> str:
    """Describe rows and size of a micro-batch. Call it before the step, which may remove entries."""
    tokens, pixels = inputs["input_ids"], inputs.get("pixel_values")
    patches = 0 if pixels is None else pixels.shape[0]
    size = f"{tokens.shape[0]} x {tokens.shape[1]} tokens, {patches:,} image patches"
    return f"{len(rows)} row(s) (row_id {_listed(rows)}), {size}"


def describe_step(rows: list[int], batches: Sequence[dict[str, Any]]) -> str:
    """Describe rows and tokens of all micro-batches of a step."""
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return f"{len(rows)} row(s) (row_id {_listed(rows)}), {tokens:,} tokens"


@contextlib.contextmanager
def explained_out_of_memory(batch: str, packing: bool, checkpointing: bool) -> Iterator[None]:
    """Turn an out-of-memory error inside into a `UserError` that names the micro-batch and what to change.

    `batch` is the text of `describe_micro_batch`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        first = first_line(error)
        smaller = "tokens_per_batch" if packing else "per_device_train_batch_size"
        saved = "" if checkpointing else ", gradient_checkpointing: true"
        raise UserError(
            f"out of memory in a micro-batch of {batch}: {first}. Set a smaller"
            f" {smaller} (global_batch_size may stay), lower max_pixels or max_length{saved}, or load_in_4bit:"
            f" true. Resume from the last checkpoint with --resume_from_checkpoint latest"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _listed(rows: list[int]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return ", ".join(map(str, rows[:_SHOWN])) + more
