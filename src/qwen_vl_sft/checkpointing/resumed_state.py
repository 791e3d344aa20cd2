"""Correct what transformers takes from a checkpoint although the recipe or the run folder decides it."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from qwen_vl_sft.checkpointing.checkpoints import Checkpoint


class CorrectState(TrainerCallback):
    """Corrects the state that the Trainer has loaded from `resume` when training begins."""

    def __init__(self, resume: Checkpoint) -> None:
        self.resume = resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct it: the Trainer has loaded it by now."""
        correct_state(state, args, self.resume)


def correct_state(state: Any, args: Any, resume: Checkpoint) -> None:
    """Have a `TrainerState` that was loaded log, evaluate and save as often as `args` say, and load the best at the end.

    The path of the best checkpoint leads to where the run folder was then. `Checkpoint.best` is the one to load.
    """
    state.compute_steps(args, state.max_steps)
    if args.load_best_model_at_end:
        state.best_model_checkpoint = str(resume.best) if resume.best else None
    if not resume.same_metric_and_eval_rows or (args.load_best_model_at_end and resume.best is None):
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None


def take_schedule(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Have an optimizer and a scheduler that were loaded go on with this run's schedule, at the step where they are.

    Both bring the peak learning rate that the run began with, and the optimizer the rate of the next step. Schedules
    that follow evaluations stay as they are (`checkpointing.resume_check`).
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        return
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * share(scheduler.last_epoch)
        group["initial_lr"] = rate
    scheduler.base_lrs = [rate] * len(scheduler.lr_lambdas)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
