"""At the end of every step: were its numbers finite, was this run told to stop, is its time up? All processes agree."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_vl_sft.checkpointing import checkpoints, row_log
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.resumed_state import correct_state
from qwen_vl_sft.checkpointing.row_log import RowLog
from qwen_vl_sft.compat.for_python import settle_before_forks
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.agreement import Agreement
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import Preempted
from qwen_vl_sft.resilience import signals
from qwen_vl_sft.resilience.deadline import Deadline, parse_duration
from qwen_vl_sft.resilience.faults import StepRecord
from qwen_vl_sft.resilience.signals import Watch
from qwen_vl_sft.resilience.watchdog import STACKS, Watchdog
from qwen_vl_sft.training.safe_trainer import SafeTrainer
from qwen_vl_sft.training.saving_trainer import EvaluationStopped, Stage

SKIPPED = "skipped_steps.jsonl"
TIME_IS_UP = "max_run_time"


class Safety(TrainerCallback):
    """Stops a run that was told to stop, with a checkpoint; and one whose loss or gradient is not finite, without."""

    def __init__(
        self, trainer: SafeTrainer, recipe: Recipe, context: DistributedContext, watch: Watch, resume: Checkpoint | None
    ) -> None:
        self.resume = resume
        self.trainer, self.folder, self.watch = trainer, recipe.output_dir, watch
        self.first = context.rank == 0
        self.way_on = "Go on with --resume_from_checkpoint latest"
        if recipe.data.dataset_streaming:
            self.way_on = "A stream cannot be gone on with: start anew with more time, or set dataset_streaming: false"
        limit = recipe.run.max_run_time
        self.deadline = Deadline(parse_duration(limit) if limit else None)
        self.agreement = Agreement(trainer.args.device)
        self.row_log = RowLog(self.folder, context.rank) if recipe.run.log_row_ids else None
        self.stopping: str | None = None
        self._posted = (0, StepRecord())
        self._began = 0.0
        self._told = 0
        self._polled = 0
        trainer.poll, trainer.settle = self.poll, self.settle
        if context.processes > 1:
            trainer.watchdog = Watchdog(self.folder, context.rank, context.processes, trainer.args.ddp_timeout)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on processes may wait for each other."""
        if self.resume:
            correct_state(state, args, self.resume)
        self._began = time.perf_counter()
        if self.trainer.watchdog:
            self.trainer.watchdog.start()
            launch.limit_waits(self.trainer.args.ddp_timeout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One may be long at something alone."""
        if self.trainer.watchdog:
            self.trainer.watchdog.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree on what the step, or on GPUs the one before, has shown."""
        self.trainer.tell(f"step {state.global_step}, at its end", state.global_step, Stage.END)
        # With the time it waited for its data.
        began, self._began = self._began, time.perf_counter()
        self.deadline.step = max(self.deadline.step, self._began - began)
        self.deadline.save = self.trainer.save_seconds
        if self.row_log:
            self.row_log.write(state.global_step, self.trainer.record.rows)
        self._tell_skipped(state.global_step)
        evaluates = bool(control.should_evaluate or self.trainer.evaluates_at_epoch_end())
        told = self._act(self.agreement.read())
        self._post(state.global_step, self.deadline.is_due(evaluates))
        # What is evaluated must be sound, and the last step has no next one. A save settles by itself.
        if not self.agreement.on_gpu or evaluates or state.global_step >= state.max_steps:
            told = self._act(self.agreement.read()) or told
        # A run that is finished anyway is finished.
        if told and state.global_step < state.max_steps:
            self.stopping = told
            self.trainer.evaluation_due = evaluates
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def settle(self) -> None:
        """Act on the last step before it is saved: on GPUs it is not read yet. All processes must call at once."""
        told = self._act(self.agreement.read())
        if told and self.trainer.state.global_step < self.trainer.state.max_steps:
            self.stopping = self.stopping or told  # `on_save` ends the run

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation may take long, so it is left too."""
        self.poll()

    def poll(self) -> None:
        """Raise `EvaluationStopped` if the run was told to stop. All processes must call equally often."""
        if not self.trainer.is_in_train:
            return
        step, self._polled = self.trainer.state.global_step, self._polled + 1
        self.trainer.tell(
            f"step {step}, evaluating after it, {self._polled} batches", step, Stage.EVALUATION, self._polled
        )
        told = self._act(self.agreement.read())
        self._post(step, self.deadline.is_due(evaluates=False), checked=True)
        if not self.agreement.on_gpu:
            told = self._act(self.agreement.read()) or told
        if told:
            self.stopping = told
            raise EvaluationStopped

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note how long an evaluation takes."""
        self._polled, self._began = 0, time.perf_counter()
        self.deadline.evaluation = max(self.deadline.evaluation, (metrics or {}).get("eval_runtime", 0.0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run here when that is what the checkpoint was for; nothing after training may happen."""
        self._began = time.perf_counter()
        if self.stopping is None:
            return
        checkpoint = checkpoints.folder_of(self.folder, state.global_step) if state.global_step else None
        if self.first:
            signals.write_mark(self.folder, self.stopping, state.global_step, checkpoint)
        written = f"{checkpoint} is written" if checkpoint else "there is nothing to save"
        raise Preempted(
            f"stopped by {self.stopping} after step {state.global_step} of {state.max_steps}; {written}. {self.way_on}"
        )

    def _post(self, step: int, time_is_up: bool, checked: bool = False) -> None:
        record, device = self.trainer.record, self.trainer.args.device
        checked = checked or self.trainer.skip_unsound
        unsound = torch.zeros((), device=device) if checked else record.unsound(device)
        told = torch.tensor([float(self.watch.reason is not None), float(time_is_up)])
        told = told.pin_memory().to(device, non_blocking=True) if self.agreement.on_gpu else told
        self.agreement.post(torch.cat([told, unsound.reshape(1)]))
        self._posted = (step, record)

    def _act(self, flags: list[float] | None) -> str | None:
        """Raise for a step that was not finite; the reason to stop, if there is one."""
        if flags is None:
            return None
        told, time_is_up, unsound = flags
        if unsound:
            self.trainer.stop_if_unsound(*self._posted)
        return self.watch.reason_of_all if told else TIME_IS_UP if time_is_up else None

    def _tell_skipped(self, step: int) -> None:
        """Keep the steps left out in the run folder, where a resume finds them."""
        for text in self.trainer.skipped[self._told :] if self.first else []:
            print(f"skipped: {text}", flush=True)
            with (self.folder / SKIPPED).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "why": text}) + "\n")
        self._told = len(self.trainer.skipped)


def attach(
    trainer: SafeTrainer,
    recipe: Recipe,
    context: DistributedContext,
    watch: Watch,
    about: dict[str, Any],
    resume: Checkpoint | None,
) -> None:
    """Have the trainer save, stop and go on as this package does. Call it on all processes when the run folder is made."""
    trainer.about = about
    trainer.skip_unsound = recipe.run.nonfinite == "skip"
    trainer.evaluation_due = resume is not None and resume.evaluation_due
    trainer.go_on_from(resume.so_far if resume else {})
    trainer.kept_step = resume.step if resume and _is_of(recipe.output_dir, resume) else 0
    trainer.add_callback(Safety(trainer, recipe, context, watch, resume))
    if context.rank == 0:
        for told in (signals.MARK, STACKS.format(rank="*")):
            for path in recipe.output_dir.glob(told):
                path.unlink()
        for pattern in (row_log.PATTERN, SKIPPED):
            row_log.forget_after(recipe.output_dir, resume.step if resume else 0, pattern)
    trainer.accelerator.wait_for_everyone()
    watch.keep_workers()
    if context.processes > 1:
        settle_before_forks()


def _is_of(run: Path, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint lies where this run would have written it, and not in another folder or under another name."""
    return checkpoint.path.resolve() == checkpoints.folder_of(run, checkpoint.step).resolve()


def skipped_steps(folder: Path) -> int:
    """How many optimizer steps of a run were left out."""
    path = folder / SKIPPED
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return len({json.loads(line)["step"] for line in lines})
