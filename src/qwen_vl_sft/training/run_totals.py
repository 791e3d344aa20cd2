"""What a run comes to over all its parts: losses, steps, seconds and speed, also from before it was resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from qwen_vl_sft.resilience.step_guard import StepGuard
from qwen_vl_sft.training.throughput import ThroughputMeter


class RunTotals:
    """Adds what a trainer has done since it started to what the run had come to before.

    Args:
        before: the totals in the manifest of the checkpoint that the run is resumed from; empty for a new run.
        guard: knows the steps that were skipped.
        throughput: counts work and time; it counts on from `before`.
    """

    def __init__(self, before: Mapping[str, Any], guard: StepGuard, throughput: ThroughputMeter) -> None:
        self._before = dict(before)
        self._guard = guard
        self._throughput = throughput
        self._began = time.monotonic()
        if "meter" in self._before:
            throughput.restore(self._before["meter"])

    def start(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def so_far(self, accelerator: Any, loss_sum: float, resumed_at: int) -> dict[str, Any]:
        """Return the totals, as a manifest stores them. All processes must call at once.

        Args:
            accelerator: adds up over processes.
            loss_sum: of all losses since the run was started or resumed, as the Trainer adds them up.
            resumed_at: the step that it was resumed from.

        `loss_sum` of the result is the sum of the losses of all steps but the first `steps_unknown`, which the checkpoint
        did not tell, and but the `steps_skipped` (`nonfinite: skip`); `seconds` are those of training, evaluations and
        saves; `meter` is what `throughput` has counted.
        """
        before, guard = self._before, self._guard
        return {
            "loss_sum": before.get("loss_sum", 0.0) + loss_sum - guard.skipped_loss,
            "steps_skipped": before.get("steps_skipped", 0) + len(guard.skipped),
            "steps_unknown": before.get("steps_unknown", 0 if "loss_sum" in before else resumed_at),
            "seconds": before.get("seconds", 0.0) + time.monotonic() - self._began,
            "meter": self._throughput.totals(accelerator),
        }


def mean_loss(totals: Mapping[str, Any], steps: int) -> float:
    """Return the mean loss over those of the run's steps that were not skipped and whose loss is known."""
    counted = steps - totals["steps_unknown"] - totals["steps_skipped"]
    return float(totals["loss_sum"] / counted) if counted else math.nan


def last_log(totals: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Return the Trainer's last log for the whole run; its own is of the steps since a resume, and counts fillers."""
    seconds, rows = totals["seconds"], totals["meter"]["work"]["rows"]
    return {
        "train_loss": mean_loss(totals, steps),
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(rows / seconds, 3),
        "train_steps_per_second": round((steps - totals["steps_unknown"]) / seconds, 3),
    }
