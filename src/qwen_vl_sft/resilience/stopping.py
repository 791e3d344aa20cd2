"""Check after every step, on all processes: were its numbers finite, was the run asked to stop, is its time up?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_vl_sft.checkpointing import checkpoints, row_log
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.agreement import Agreement
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import Preempted
from qwen_vl_sft.resilience import signals
from qwen_vl_sft.resilience.deadline import Deadline
from qwen_vl_sft.resilience.due_evaluation import DueEvaluation
from qwen_vl_sft.resilience.faults import StepRecord
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.resilience.step_guard import StepGuard
from qwen_vl_sft.resilience.step_log import SKIPPED
from qwen_vl_sft.resilience.watchdog import STACKS, Stage, Watchdog

TIME_IS_UP = "max_run_time"
_RESUME = "Resume with --resume_from_checkpoint latest"
_NEW_RUN = "A stream cannot be resumed: start again with more time, or set dataset_streaming: false"


class EvaluationStopped(Exception):
    """The run was asked to stop during an evaluation."""


class RunStopper(TrainerCallback):
    """Stops a run: with a checkpoint when asked to, without one when a loss or gradient is not finite.

    Args:
        folder: the run folder.
        context: how the run was launched.
        device: where the model computes.
        watcher: knows whether this process was asked to stop.
        deadline: knows when the time is up.
        writer: knows how long a save takes.
        guard: has the record of each step.
        evaluations: notes an evaluation that a stop postpones.
        watchdog: gets the progress of this process.
        streams: the run reads a stream, and cannot be resumed.
    """

    def __init__(
        self,
        folder: Path,
        context: DistributedContext,
        device: torch.device,
        watcher: SignalWatcher,
        deadline: Deadline,
        writer: CheckpointWriter,
        guard: StepGuard,
        evaluations: DueEvaluation,
        watchdog: Watchdog,
        streams: bool = False,
    ) -> None:
        self.folder, self.context, self.device = folder, context, device
        self.watcher, self.deadline, self.writer = watcher, deadline, writer
        self.guard, self.evaluations, self.watchdog = guard, evaluations, watchdog
        self.way_on = _NEW_RUN if streams else _RESUME
        self.agreement = Agreement(device)
        self.stopping: str | None = None
        self._posted = (0, StepRecord())
        self._began = 0.0
        self._checks = 0
        self._in_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watchdog; from now on processes wait for each other."""
        self._began, self._in_training = time.perf_counter(), True
        if self.context.processes > 1:
            self.watchdog.start()
            launch.limit_waits(args.ddp_timeout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the watchdog; one process may now work alone."""
        self._in_training = False
        self.watchdog.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share stop and NaN flags over processes (on GPUs one step late)."""
        self.watchdog.report_progress(f"step {state.global_step}, at its end", state.global_step, Stage.END)
        # Includes the wait for data.
        began, self._began = self._began, time.perf_counter()
        self.deadline.note_step(self._began - began)
        self.deadline.note_save(self.writer.longest_seconds)
        evaluates = bool(control.should_evaluate or self.evaluations.comes_at_epoch_end(state))
        stops = self._act(self.agreement.read())
        self._post(state.global_step, self.deadline.is_due(evaluates))
        # An evaluation needs finite weights, and the last step has no next one. A save reads the flags itself.
        if not self.agreement.on_gpu or evaluates or state.global_step >= state.max_steps:
            stops = self._act(self.agreement.read()) or stops
        # After the last step there is nothing to stop.
        if stops and state.global_step < state.max_steps:
            self.stopping = stops
            self.evaluations.postpone(evaluates)
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def check_pending_step(self, state: Any) -> None:
        """Act on the last step before it is saved: on GPUs it is not read yet. All processes must call at once.

        Raises `UserError` when the checkpoint would hold the outcome of a step that was not finite.
        """
        stops = self._act(self.agreement.read())
        if stops and state.global_step < state.max_steps:
            self.stopping = self.stopping or stops  # `on_save` ends the run

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop during an evaluation too, which may take long."""
        self.check_stop(state.global_step)

    def check_stop(self, step: int) -> None:
        """Raise `EvaluationStopped` if the run was asked to stop. All processes must call equally often."""
        if not self._in_training:
            return
        self._checks += 1
        doing = f"step {step}, evaluating after it, {self._checks} batches"
        self.watchdog.report_progress(doing, step, Stage.EVALUATION, self._checks)
        stops = self._act(self.agreement.read())
        self._post(step, self.deadline.is_due(evaluates=False), checked=True)
        if not self.agreement.on_gpu:
            stops = self._act(self.agreement.read()) or stops
        if stops:
            self.stopping = stops
            raise EvaluationStopped

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note how long an evaluation takes."""
        self._checks, self._began = 0, time.perf_counter()
        self.deadline.note_evaluation((metrics or {}).get("eval_runtime", 0.0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run if it was stopped; the checkpoint is written, and nothing after training may run."""
        self._began = time.perf_counter()
        if self.stopping is None:
            return
        checkpoint = checkpoints.folder_of(self.folder, state.global_step) if state.global_step else None
        if self.context.rank == 0:
            signals.write_preempted(self.folder, self.stopping, state.global_step, checkpoint)
        written = f"{checkpoint} is written" if checkpoint else "there is nothing to save"
        raise Preempted(
            f"stopped by {self.stopping} after step {state.global_step} of {state.max_steps}; {written}. {self.way_on}"
        )

    def _post(self, step: int, time_is_up: bool, checked: bool = False) -> None:
        record = self.guard.record
        checked = checked or self.guard.skips
        not_finite = torch.zeros((), device=self.device) if checked else record.not_finite(self.device)
        stops = torch.tensor([float(self.watcher.reason is not None), float(time_is_up)])
        stops = stops.pin_memory().to(self.device, non_blocking=True) if self.agreement.on_gpu else stops
        self.agreement.post(torch.cat([stops, not_finite.reshape(1)]))
        self._posted = (step, record)

    def _act(self, flags: list[float] | None) -> str | None:
        """Raise for a step that was not finite; return the reason to stop, if there is one."""
        if flags is None:
            return None
        stops, time_is_up, not_finite = flags
        if not_finite:
            self.guard.stop(*self._posted)
        return self.watcher.reason_of_all if stops else TIME_IS_UP if time_is_up else None


def remove_leftovers_of_stopped_run(folder: Path, step: int) -> None:
    """Remove leftovers of a stopped run from its folder: files about its end, and log lines after the resumed step.

    Call it on one process only, before training.
    """
    for pattern in (signals.PREEMPTED, STACKS.format(rank="*")):
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in (row_log.PATTERN, SKIPPED):
        row_log.forget_after(folder, step, pattern)
