"""Restore values that the recipe sets, after transformers overwrote them from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.errors import UserError


class CorrectState(TrainerCallback):
    """Corrects the state that the Trainer has loaded from `resume` when training begins."""

    def __init__(self, resume: Checkpoint) -> None:
        self.resume = resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct the loaded state; by now the Trainer has loaded it."""
        correct_state(state, args, self.resume)


def correct_state(state: Any, args: Any, resume: Checkpoint) -> None:
    """Make a loaded `TrainerState` log, evaluate and save as often as `args` say, and load the best model at the end.

    The loaded path of the best checkpoint may be outdated; `Checkpoint.best` is used instead.
    """
    state.compute_steps(args, state.max_steps)
    if args.load_best_model_at_end:
        state.best_model_checkpoint = str(resume.best) if resume.best else None
    if not resume.same_metric_and_eval_rows or (args.load_best_model_at_end and resume.best is None):
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None


@contextmanager
def explained_groups(checkpoint: str | None, optimizer: Any) -> Iterator[None]:
    """Tell why the optimizer of a checkpoint does not fit. Raises `UserError`.

    Earlier versions had transformers' groups: with a `weight_decay`, norms of Qwen2.5-VL's tower and `A_log` of Qwen3.5 were
    among the matrices.
    """
    problem: ValueError | None = None
    try:
        yield
    except ValueError as error:
        if "parameter group" not in str(error):
            raise
        problem = error
    # FSDP2's loading raises nothing: it leaves a group without settings.
    if problem or (checkpoint and not all("weight_decay" in group for group in optimizer.param_groups)):
        raise UserError(
            f"resume_from_checkpoint: the optimizer of {checkpoint} shrinks other parameters by weight_decay than this"
            f" version does; start a new run in another output_dir"
        ) from problem


def take_schedule(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Make a loaded optimizer and scheduler continue with this run's schedule, at their step.

    Both hold the peak learning rate of the earlier run, and the optimizer the rate of the next step. Schedules that follow
    evaluations are left unchanged (`checkpointing.resume_check`).
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        return
    for group, share in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * share(scheduler.last_epoch)
        group["initial_lr"] = rate
    scheduler.base_lrs = [rate] * len(scheduler.lr_lambdas)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
