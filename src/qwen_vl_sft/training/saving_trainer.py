"""TRL's trainer with saves that are whole or nothing, and resumes that are exact."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from trl import SFTTrainer

from qwen_vl_sft.checkpointing import checkpoints, rotation
from qwen_vl_sft.checkpointing.resumed_state import take_schedule
from qwen_vl_sft.random_state import random_state, set_random_state
from qwen_vl_sft.resilience.faults import explained_save
from qwen_vl_sft.resilience.watchdog import Watchdog


class Stage(IntEnum):
    """What a step goes through, in this order; an evaluation and a checkpoint are those after the step."""

    DATA, TOKENS, MICRO_BATCHES, GRADIENT, END, EVALUATION, SAVE, SAVED = range(8)


class EvaluationStopped(Exception):
    """The run was told to stop in the middle of an evaluation."""


class SavingTrainer(SFTTrainer):
    """What `SafeTrainer` builds on.

    `about` goes into the mark of every checkpoint, and so does `evaluation_due`: the run was stopped where it should have
    evaluated next. `kept_step` is that of the newest checkpoint of this run in its folder: the last one that was saved,
    or the one it went on from. `poll`, called between the batches of an evaluation, may raise `EvaluationStopped`.
    `pause` stops the clock of training, before an evaluation and before a checkpoint.
    `settle`, called before a checkpoint is written, raises when that would hold the outcome of a step that was not finite.
    `before` is what the run had come to (`so_far`) at the checkpoint that it went on from, `finished` at its end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.about: dict[str, Any] = {"world": {"processes": self.args.world_size}}
        self.evaluation_due = False
        self.kept_step = 0
        self.before: dict[str, Any] = {}
        self.finished: dict[str, Any] = {}
        self._began = time.monotonic()
        self._evaluated_step: int | None = None
        self.save_seconds: float | None = None
        self.poll: Callable[[], None] | None = None
        self.settle: Callable[[], None] | None = None
        self.pause: Callable[[], None] | None = None
        self.watchdog: Watchdog | None = None
        self._held: dict[str, torch.Tensor] = {}
        # The Trainer would delete old checkpoints before the new one is marked, and at the end before the model is saved.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None

    def tell(self, doing: str, *place: int) -> None:
        """Note what this process goes on to, for a report if it never comes back: `place` is step, stage, and number."""
        if self.watchdog is not None:
            self.watchdog.move(doing, place)

    def so_far(self) -> dict[str, Any]:
        """What the whole run has come to, also before it was resumed. All processes must call at once, while training.

        Returns `loss_sum`, the losses of all steps added up but the first `steps_unknown`, of which the checkpoint that
        the run went on from did not tell, and `seconds` of training, evaluations and saves.
        """
        unknown = 0 if "loss_sum" in self.before else self._initial_global_step
        # Since the last log; each process has its own.
        unlogged = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        return {
            "loss_sum": self.before.get("loss_sum", 0.0) + self._total_loss_scalar + unlogged,
            "steps_unknown": self.before.get("steps_unknown", unknown),
            "seconds": self.before.get("seconds", 0.0) + time.monotonic() - self._began,
        }

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
        if self.pause:
            self.pause()
        if self.settle:
            self.settle()
        began = time.perf_counter()
        step = self.state.global_step
        self.tell(f"step {step}, saving a checkpoint", step, Stage.SAVE)
        run = Path(self.args.output_dir or "")
        folder = checkpoints.folder_of(run, step)
        with explained_save("a checkpoint", folder, checkpoints.newest_marked(run, self.kept_step), remove=True):
            if self.args.should_save and folder.exists():
                _clear(folder)
            self.accelerator.wait_for_everyone()
            # The Trainer looks whether the best checkpoint's folder exists in order to load it at the end. Under FSDP
            # with split checkpoints nothing has made the newest one's folder by then, or only some processes see it,
            # and the others wait for them for ever. May go when transformers makes the folder first.
            folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.tell(f"step {step}, its checkpoint is written", step, Stage.SAVED)
            self.accelerator.wait_for_everyone()
            so_far = self.so_far()
            if self.args.should_save:
                checkpoints.check_parts(folder, self.about["world"]["processes"])
                rotation.set_aside(run, self.kept_step, folder, _tell)
                due = self.evaluation_due or self.evaluates_at_epoch_end()
                checkpoints.write_mark(folder, {**self.about, "evaluation_due": due, "so_far": so_far})
        self.kept_step = step
        if self.args.should_save:
            rotation.rotate(run, self._keep, folder, self.state.best_model_checkpoint)
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

    def evaluates_at_epoch_end(self) -> bool:
        """Whether the step that has ended is the last of an epoch, or of the run, whose evaluation is still to come.

        The Trainer announces it only when the step is logged and saved.
        """
        epoch = self.state.epoch or 0.0
        ends = self.state.global_step >= self.state.max_steps or abs(epoch - round(epoch)) < 1e-9
        wanted = self.args.eval_strategy == "epoch" and self.args.eval_delay <= epoch
        return ends and wanted and self._evaluated_step != self.state.global_step

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.tell(f"step {self.state.global_step}, evaluating after it", self.state.global_step, Stage.EVALUATION)
        if self.pause:
            self.pause()
        numbers = random_state()
        try:
            metrics = super()._evaluate(*args, **kwargs)
            self._evaluated_step = self.state.global_step
            return metrics
        except EvaluationStopped:
            # The checkpoint is that of the moment before, and a resume begins with this evaluation.
            set_random_state(numbers)
            self.evaluation_due = True
            # A resume that is stopped in its first evaluation has this checkpoint already.
            if self.state.global_step != self.kept_step:
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise

    # A resume

    def go_on_from(self, so_far: Mapping[str, Any]) -> None:
        """Take up what the run had come to at the checkpoint that it goes on from."""
        self.before = dict(so_far)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._began = time.monotonic()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last step's checkpoint: the Trainer would train one more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            take_schedule(self.optimizer, self.lr_scheduler, self.args.learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._evaluate_what_is_due()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluate_what_is_due()
        self.finished = self.so_far()
        return super()._finalize_training(*args, **kwargs)

    def _evaluate_what_is_due(self) -> None:
        """Evaluate where the stopped run would have: its random numbers are those of that moment now."""
        due, self.evaluation_due = self.evaluation_due, False
        if due and self.args.eval_strategy != "no":
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            best = checkpoints.folder_of(Path(self.args.output_dir or ""), self.state.global_step)
            if self.state.best_global_step == self.state.global_step and best.is_dir():
                self.state.best_model_checkpoint = str(best)


def _clear(folder: Path) -> None:
    """Make room for a checkpoint: half of it, from a run that was killed, may have files of more processes."""
    if (folder / checkpoints.MARK).is_file():
        _tell(f"{folder}, which an earlier attempt had saved, is kept as {rotation.make_room(folder).name}")
    else:
        shutil.rmtree(folder)


def _tell(message: str) -> None:
    print(f"checkpoints: {message}", file=sys.stderr, flush=True)


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


def save_final_model(trainer: SavingTrainer, folder: Path) -> None:
    """Save the finished model. Raises `UserError` when it cannot be written."""
    last = checkpoints.newest_marked(folder, trainer.kept_step)
    with explained_save("the finished model", folder, last, remove=False):
        trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
