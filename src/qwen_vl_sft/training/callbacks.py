"""Hooks into the Trainer's loop: the order of an epoch, the clock, and what a person sees while training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from qwen_vl_sft.batching.packing import StepSampler
from qwen_vl_sft.batching.sampler import EpochSampler
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.distributed.launch import check_running
from qwen_vl_sft.evaluation.metrics import headline_in_log

_IMAGES = {"images_per_second": ("", "{:.3g} img/s")}


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins; accelerate does not pass it on to a sampler inside a sharded batch sampler."""

    def __init__(self, sampler: EpochSampler | StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on: `state.epoch` is a whole number here, or on a resume the fraction already done."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class CheckWorld(TrainerCallback):
    """Stops a run whose model was not wrapped as the launcher was asked to."""

    def __init__(self, context: DistributedContext, trainer: Any) -> None:
        self.context = context
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check it: the Trainer has prepared the model by now."""
        check_running(self.context, self.trainer.accelerator, self.trainer.model_wrapped)


class Progress(ProgressCallback):
    """The Trainer's bar, with a short line for each log instead of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "train_runtime" not in logs:
            self.training_bar.write(format_log(state.global_step, state.max_steps, logs))


def format_log(step: int, max_steps: int, logs: dict[str, Any]) -> str:
    """Format a log entry in at most 80 columns."""
    answered = headline_in_log(logs)
    names = {
        "loss": ("loss", "{:.4g}"),
        "eval_loss": ("eval loss", "{:.4f}"),
        "eval_mean_token_accuracy": ("right tokens", "{:.1%}"),
        **({f"eval_{answered[0].replace(' ', '_')}": (answered[0], "{:.1%}")} if answered else {}),
        "learning_rate": ("lr", "{:.1e}"),
        "tokens_per_second": ("", "{:,.0f} tok/s"),
        # A line has room for one of the two.
        **({"expert_load_max": ("load", "{:.2g}x")} if "expert_load_max" in logs else _IMAGES),
        "data_wait": ("wait", "{:.0%}"),
        "mfu": ("mfu", "{:.0%}"),
    }
    parts = [f"{label} {style.format(logs[key])}".strip() for key, (label, style) in names.items() if key in logs]
    return f"{step:>{len(str(max_steps))}}/{max_steps}  " + "  ".join(parts)
