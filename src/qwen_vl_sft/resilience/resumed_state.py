"""What transformers takes from a checkpoint although the recipe, or the run folder, says it now."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.outputs.checkpoints import Checkpoint


def correct_state(state: Any, args: Any, resume: Checkpoint) -> None:
    """Have a `TrainerState` that was loaded log, evaluate and save as often as `args` say, and load the best at the end.

    The path of the best checkpoint leads to where the run folder was then. `Checkpoint.best` is the one to load.
    """
    state.compute_steps(args, state.max_steps)
    if not args.load_best_model_at_end:
        return
    state.best_model_checkpoint = str(resume.best) if resume.best else None
    if resume.best is None:
        state.best_metric = state.best_global_step = None


def take_learning_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Have an optimizer and a scheduler that were loaded go on with another peak learning rate.

    Both bring the one that the run began with. Where the schedule is at, as a share of the peak, stays.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    before = getattr(scheduler, "base_lrs", [])
    if not any(before) or all(one == rate for one in before):
        return
    for group, one in zip(optimizer.param_groups, before, strict=True):
        group["lr"] *= rate / one
        group["initial_lr"] = rate
    scheduler.base_lrs = [rate] * len(before)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
