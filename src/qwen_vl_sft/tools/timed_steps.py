"""Train some steps, and take their time: what was fetched, waited for and computed after a warm-up."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.training.throughput import TimedIterator


@dataclass
class Fetched:
    """What a trainer has fetched: seconds it waited, and by step the work of our micro-batches; TRL's tell none."""

    seconds: float = 0.0
    steps: list[list[BatchStats]] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def watched_fetching(trainer: Any) -> Iterator[Fetched]:
    """Watch which batches a trainer fetches, and how long it waits for them.

    What it does with a batch once it has it, such as counting on the GPU, is no waiting for data.
    """
    fetched, fetch = Fetched(), trainer.get_batch_samples

    def watched(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        source = TimedIterator(batches)
        try:
            steps, count = fetch(source, *args, **kwargs)
        finally:
            fetched.seconds += source.seconds
        packed = [batch for step in steps for batch in step.get(MICRO_BATCHES, ())]
        fetched.steps.append([BatchStats(**batch["stats"]) for batch in packed])
        return steps, count

    trainer.get_batch_samples = watched
    try:
        yield fetched
    finally:
        del trainer.get_batch_samples


@dataclass(frozen=True)
class Mark:
    """A moment of a run: seconds, seconds waited so far, and what was asked for."""

    seconds: float
    waited: float
    told: Any


class StepClock(TrainerCallback):
    """Marks the ends of `warmup` steps and of the last one; the device has done its work at both.

    Args:
        warmup: steps.
        fetched: tells the seconds waited.
        ask: is asked at both ends, with the number of the step.
    """

    def __init__(self, warmup: int, fetched: Fetched, ask: Callable[[int], Any]) -> None:
        self.warmup = warmup
        self.fetched = fetched
        self.ask = ask
        self.marks: list[Mark] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of the warm-up and of the last step."""
        if state.global_step == self.warmup or state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            told = self.ask(state.global_step)
            self.marks.append(Mark(time.perf_counter(), self.fetched.seconds, told))


@dataclass(frozen=True)
class TimedSteps:
    """Steps that were trained: where those after the warm-up began and ended, and what was fetched for all of them."""

    began: Mark
    ended: Mark
    fetched: Fetched

    @property
    def seconds(self) -> float:
        """Return the seconds of the steps after the warm-up."""
        return self.ended.seconds - self.began.seconds


def train_timed(trainer: Any, steps: int, warmup: int, ask: Callable[[int], Any] = lambda step: None) -> TimedSteps:
    """Train `warmup` and `steps` steps. The GPU's peak of memory is then that of these steps."""
    trainer.args.max_steps = warmup + steps
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with watched_fetching(trainer) as fetched:
        clock = StepClock(warmup, fetched, ask)
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)
    began, ended = clock.marks
    return TimedSteps(began, ended, fetched)
