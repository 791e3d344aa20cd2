"""At the end of every step: were its numbers finite, was this run told to stop, is its time up? All processes agree."""

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
_START_ANEW = "A stream cannot be resumed: start anew with more time, or set dataset_streaming: false"


class EvaluationStopped(Exception):
    """The run was told to stop in the middle of an evaluation."""


class RunStopper(TrainerCallback):
    """Stops a run that was told to stop, with a checkpoint; and one whose loss or gradient is not finite, without.

    Args:
        folder: the run folder.
        context: how the run was launched.
        device: where the model computes.
        watcher: knows whether this process was told to stop.
        deadline: knows when the time is up.
        writer: knows how long a save takes.
        guard: has the record of each step.
        evaluations: told of an evaluation that a stop postpones.
        watchdog: told where this process is.
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
        self.way_on = _START_ANEW if streams else _RESUME
        self.agreement = Agreement(device)
        self.stopping: str | None = None
        self._posted = (0, StepRecord())
        self._began = 0.0
        self._checks = 0
        self._in_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect from now on that processes wait for each other."""
        self._began, self._in_training = time.perf_counter(), True
        if self.context.processes > 1:
            self.watchdog.start()
            launch.limit_waits(args.ddp_timeout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let one process be long at something alone."""
        self._in_training = False
        self.watchdog.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree on what the step, or on GPUs the one before, has shown."""
        self.watchdog.report_progress(f"step {state.global_step}, at its end", state.global_step, Stage.END)
        # With the time it waited for its data.
        began, self._began = self._began, time.perf_counter()
        self.deadline.note_step(self._began - began)
        self.deadline.note_save(self.writer.longest_seconds)
        evaluates = bool(control.should_evaluate or self.evaluations.comes_at_epoch_end(state))
        told = self._act(self.agreement.read())
        self._post(state.global_step, self.deadline.is_due(evaluates))
        # What is evaluated must be sound, and the last step has no next one. A save reads the agreement itself.
        if not self.agreement.on_gpu or evaluates or state.global_step >= state.max_steps:
            told = self._act(self.agreement.read()) or told
        # A run that is finished anyway is finished.
        if told and state.global_step < state.max_steps:
            self.stopping = told
            self.evaluations.postpone(evaluates)
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def check_pending_step(self, state: Any) -> None:
        """Act on the last step before it is saved: on GPUs it is not read yet. All processes must call at once.

        Raises `UserError` when the checkpoint would hold the outcome of a step that was not finite.
        """
        told = self._act(self.agreement.read())
        if told and state.global_step < state.max_steps:
            self.stopping = self.stopping or told  # `on_save` ends the run

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation too, which may take long."""
        self.check_stop(state.global_step)

    def check_stop(self, step: int) -> None:
        """Raise `EvaluationStopped` if the run was told to stop. All processes must call equally often."""
        if not self._in_training:
            return
        self._checks += 1
        doing = f"step {step}, evaluating after it, {self._checks} batches"
        self.watchdog.report_progress(doing, step, Stage.EVALUATION, self._checks)
        told = self._act(self.agreement.read())
        self._post(step, self.deadline.is_due(evaluates=False), checked=True)
        if not self.agreement.on_gpu:
            told = self._act(self.agreement.read()) or told
        if told:
            self.stopping = told
            raise EvaluationStopped

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note how long an evaluation takes."""
        self._checks, self._began = 0, time.perf_counter()
        self.deadline.note_evaluation((metrics or {}).get("eval_runtime", 0.0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run here when that is what the checkpoint was for; nothing after training may happen."""
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
        told = torch.tensor([float(self.watcher.reason is not None), float(time_is_up)])
        told = told.pin_memory().to(self.device, non_blocking=True) if self.agreement.on_gpu else told
        self.agreement.post(torch.cat([told, not_finite.reshape(1)]))
        self._posted = (step, record)

    def _act(self, flags: list[float] | None) -> str | None:
        """Raise for a step that was not finite; return the reason to stop, if there is one."""
        if flags is None:
            return None
        told, time_is_up, not_finite = flags
        if not_finite:
            self.guard.stop(*self._posted)
        return self.watcher.reason_of_all if told else TIME_IS_UP if time_is_up else None


def remove_leftovers_of_stopped_run(folder: Path, step: int) -> None:
    """Remove what an earlier attempt left in the run folder of its end, and of steps after the one resumed from.

    Call it on one process only, before training.
    """
    for pattern in (signals.PREEMPTED, STACKS.format(rank="*")):
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in (row_log.PATTERN, SKIPPED):
        row_log.forget_after(folder, step, pattern)
