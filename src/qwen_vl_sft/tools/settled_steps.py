"""Tell when the steps of a run have settled: the allocator has what it needs, and steps take as long as those before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_vl_sft.families.shape import Work
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.planning.run import RunPlan
from qwen_vl_sft.planning.speed import step_time
from qwen_vl_sft.tools.timed_steps import Fetched

# Steps are alike when the times of the later half of those that count differ by less than this from the earlier half's.
ALIKE = 0.05
STARTS = 300
WORK = ("tokens", "tokens_squared", "target_tokens", "patches", "patches_squared")


@dataclass(frozen=True)
class TrainedStep:
    """A step as it was.

    Attributes:
        seconds: without those that it waited for data.
        waited: seconds.
        planned: the plan's seconds for its rows.
        start: seconds that the host took to start a small kernel just after it; see `seconds_of_a_start`.
        driver_bytes: what the driver had given to the allocator and taken back, since the process began.
        began_epoch: workers were started anew.
    """

    seconds: float
    waited: float
    planned: float
    start: float
    driver_bytes: int
    began_epoch: bool


class Steps(TrainerCallback):
    """Keeps what each step took, and ends the run once its steps have settled.

    Args:
        fetched: what the run has fetched, by step.
        plan: the plan of the run.
        checkpointed: layers.
        epoch: steps of an epoch.
        warmup: first steps, which never count.
        counted: steps that count.
    """

    def __init__(
        self, fetched: Fetched, plan: RunPlan, checkpointed: int, epoch: int, warmup: int, counted: int
    ) -> None:
        self.fetched, self.plan, self.checkpointed = fetched, plan, checkpointed
        self.epoch, self.warmup, self.counted = epoch, warmup, counted
        self.done: list[TrainedStep] = []
        self.ended, self.waited = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep it; the norm of the gradient has waited for the device by now."""
        number, now, waited = len(self.done), time.perf_counter(), self.fetched.seconds
        batches = self.fetched.steps[number]
        work = Work(*(getattr(sum(batches, BatchStats()), name) for name in WORK))
        planned = step_time(self.plan.training, self.plan.card, work, len(batches), self.checkpointed).seconds
        passed = now - self.ended - (waited - self.waited)
        start = seconds_of_a_start(args.device)
        began = number % self.epoch == 0
        self.done.append(TrainedStep(passed, waited - self.waited, planned, start, _driver_bytes(), began))
        self.ended, self.waited = time.perf_counter(), waited
        control.should_training_stop |= have_settled(self.done, self.warmup, self.counted)


def counting(steps: Sequence[TrainedStep], warmup: int, counted: int) -> list[int]:
    """Return the numbers of the steps that count, from 0: the last ones after the warm-up, but those that begin an epoch.

    Where no step is left, the last ones count.
    """
    after = range(min(warmup, len(steps) - 1), len(steps))
    return ([number for number in after if not steps[number].began_epoch] or list(after))[-counted:]


def have_settled(steps: Sequence[TrainedStep], warmup: int, counted: int) -> bool:
    """Return whether the last `counted` steps are alike.

    They are when there are so many; no memory came from the driver meanwhile, nor went back; and the times of their
    halves, as shares of what the plan says for their rows, differ by less than `ALIKE`.
    """
    last = counting(steps, warmup, counted)
    if len(last) < counted or len(steps) <= warmup:
        return False
    grown = steps[-1].driver_bytes - steps[max(last[0] - 1, 0)].driver_bytes
    shares = [steps[number].seconds / steps[number].planned for number in last]
    half = len(shares) // 2
    if grown or not half:
        return not grown
    early, late = statistics.fmean(shares[:half]), statistics.fmean(shares[half:])
    return abs(late / early - 1) < ALIKE


def seconds_of_a_start(device: torch.device) -> float:
    """Return the seconds that the host takes to start a small kernel, on average over `STARTS`.

    It starts thousands in a step. What else runs on the machine makes it slower, and so do the threads of a data loader.
    """
    value = torch.zeros(1, device=device)
    _finish(device)
    began = time.perf_counter()
    for _ in range(STARTS):
        value.add_(1)
    passed = time.perf_counter() - began
    _finish(device)
    return passed / STARTS


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _driver_bytes() -> int:
    """Return the bytes that the driver has given to PyTorch's allocator and taken back since the process began."""
    if not torch.cuda.is_available():
        return 0
    told = torch.cuda.memory_stats()
    return int(told["reserved_bytes.all.allocated"] + told["reserved_bytes.all.freed"])
