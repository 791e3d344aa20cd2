"""TRL's trainer with saves that are whole or nothing, exact resumes, and faults told with the rows they happened on."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from trl import SFTTrainer

from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES
from qwen_vl_sft.outputs import checkpoints
from qwen_vl_sft.random_state import random_state, set_random_state
from qwen_vl_sft.resilience.faults import (
    StepRecord,
    describe_micro_batch,
    describe_step,
    describe_unsound,
    explained_out_of_memory,
    explained_save,
    unsound_error,
)
from qwen_vl_sft.resilience.resumed_state import take_learning_rate
from qwen_vl_sft.resilience.stall import StallWatch

ROW_IDS = "row_ids"


class Stage(IntEnum):
    """What a step goes through, in this order; an evaluation and a checkpoint are those after the step."""

    DATA, TOKENS, MICRO_BATCHES, GRADIENT, END, EVALUATION, SAVE, SAVED = range(8)


class EvaluationStopped(Exception):
    """The run was told to stop in the middle of an evaluation."""


class SafeTrainer(SFTTrainer):
    """What `VisionSFTTrainer` builds on. Batches carry the ids of their rows under `row_ids`, a list of numbers.

    `about` goes into the mark of every checkpoint. `evaluation_due` says that the run was stopped where it should have
    evaluated next. `poll`, called between the batches of an evaluation, may raise `EvaluationStopped`. `skip_unsound`
    leaves steps out whose loss or gradient is not finite, and `skipped` tells of each. `failed_loggers` tells why, by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.about: dict[str, Any] = {"world": {"processes": self.args.world_size}}
        self.evaluation_due = False
        self.skip_unsound = False
        self.skipped: list[str] = []
        self.failed_loggers: dict[str, str] = {}
        self.record = StepRecord()
        self.save_seconds: float | None = None
        self.poll: Callable[[], None] | None = None
        self.stall_watch: StallWatch | None = None
        self._after_loss: tuple[Any, ...] | None = None
        self._held: dict[str, torch.Tensor] = {}
        # The Trainer would delete old checkpoints before the new one is marked, and at the end before the model is saved.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None

    def tell(self, doing: str, *place: int) -> None:
        """Note what this process goes on to, for a report if it never comes back: `place` is step, stage, and number."""
        if self.stall_watch is not None:
            self.stall_watch.move(doing, place)

    # A step

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

    # A save

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; an adapter that DeepSpeed trains as the optimizer holds it. All processes must call at once."""
        assert isinstance(self.model, nn.Module)
        exact = is_peft_model(self.model) and self.is_deepspeed_enabled
        self._held = held_by_deepspeed(self.model) if exact else {}
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._held = {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict:
            state_dict = {name: self._held.get(name, value) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began = time.perf_counter()
        step = self.state.global_step
        self.tell(f"step {step}, saving a checkpoint", step, Stage.SAVE)
        run = Path(self.args.output_dir or "")
        folder = run / f"checkpoint-{self.state.global_step}"
        kept = [path for path in checkpoints.folders(run) if (path / checkpoints.MARK).is_file() and path != folder]
        last = kept[-1] if kept else None
        with explained_save("a checkpoint", folder, last, remove=True):
            if self.args.should_save and folder.exists():
                # Half of it, from a run that was killed: perhaps with files of more processes.
                (folder / checkpoints.MARK).unlink(missing_ok=True)
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            # The Trainer looks whether the best checkpoint's folder exists in order to load it at the end. Under FSDP
            # with split checkpoints nothing has made the newest one's folder by then, or only some processes see it,
            # and the others wait for them for ever. May go when transformers makes the folder first.
            folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.tell(f"step {step}, its checkpoint is written", step, Stage.SAVED)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.write_mark(folder, {**self.about, "evaluation_due": self.evaluation_due})
        if self.args.should_save:
            checkpoints.rotate(run, self._keep, self.state.best_model_checkpoint)
        self.tell(f"step {step}, its checkpoint is marked", step, Stage.SAVED, 1)
        # Nobody leaves before the mark is written.
        self.accelerator.wait_for_everyone()
        self.save_seconds = max(time.perf_counter() - began, self.save_seconds or 0.0)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            # Between two checkpoints the best model would be gone, and the Trainer would load an older one at the end.
            self.control.should_save = True
        return best

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.tell(f"step {self.state.global_step}, evaluating after it", self.state.global_step, Stage.EVALUATION)
        numbers = random_state()
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            # The checkpoint is that of the moment before, and a resume begins with this evaluation.
            set_random_state(numbers)
            self.evaluation_due = True
            step = self.state.global_step
            # A resume that is stopped in its first evaluation has this checkpoint already.
            if step and not Path(self.args.output_dir or "", f"checkpoint-{step}", checkpoints.MARK).is_file():
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise

    # A resume

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint: the Trainer would train one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            take_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._evaluate_what_is_due()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluate_what_is_due()
        return super()._finalize_training(*args, **kwargs)

    def _evaluate_what_is_due(self) -> None:
        """Evaluate where the stopped run would have: its random numbers are those of that moment now."""
        if self.evaluation_due:
            self.evaluation_due = False
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            best = Path(self.args.output_dir or "", f"checkpoint-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step and best.is_dir():
                self.state.best_model_checkpoint = str(best)


def held_by_deepspeed(model: nn.Module) -> dict[str, torch.Tensor]:
    """The float32 copies that DeepSpeed steps on of what trains in less, whole, by name. All processes must call at once.

    The model itself holds them rounded to bfloat16, and so would a file of it, other than that of DDP.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    held = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            whole = safe_get_full_fp32_param(parameter)
            if whole is not None:
                held[name] = whole.detach().cpu()
    return held


def save_final_model(trainer: SafeTrainer, folder: Path) -> None:
    """Save the finished model. Raises `UserError` when it cannot be written."""
    whole = [path for path in checkpoints.folders(folder) if (path / checkpoints.MARK).is_file()]
    with explained_save("the finished model", folder, whole[-1] if whole else None, remove=False):
        trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
