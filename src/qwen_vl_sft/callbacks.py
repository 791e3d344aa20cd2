"""What a person sees while training: a bar, a line a log, and speed measured over all processes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from qwen_vl_sft.flops import FlopCounter, Work, peak_flops
from qwen_vl_sft.sampler import EpochSampler


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins; accelerate does not pass it on to a sampler inside a sharded batch sampler."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`state.epoch` is a whole number here, or on a resume the fraction already done."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class Throughput(TrainerCallback):
    """Adds speed to the training logs: tokens, images and rows a second, waiting for data, memory and MFU.

    Seconds of evaluation and saving are not counted. Call `measure` from all processes at once.
    """

    def __init__(self, counter: FlopCounter) -> None:
        self.counter = counter
        self.trainer: Any = None
        self.total = Work()
        self.seconds = 0.0
        self.waited = 0.0
        self._peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._began: float | None = None
        self._elapsed = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; it began with the fetching of the step's data when a step came before."""
        if self._began is None:
            self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock when something other than training follows."""
        if control.should_log or control.should_evaluate or control.should_save:
            self._pause()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what came after the last log."""
        self._pause()
        self.measure()

    def measure(self) -> dict[str, float]:
        """Speed of all processes together since the last call, as log entries."""
        work, waited = self.trainer.take_work()
        seconds, self._elapsed = self._elapsed, 0.0
        numbers = torch.tensor([*vars(work).values(), waited], dtype=torch.float64, device=self.trainer.args.device)
        totals = self.trainer.accelerator.reduce(numbers, reduction="sum").tolist()
        processes = self.trainer.accelerator.num_processes
        everyones, waited = Work(*(int(value) for value in totals[:-1])), totals[-1] / processes
        self.total += everyones
        self.seconds += seconds
        self.waited += waited
        return self.speeds(everyones, seconds, waited) if seconds else {}

    def speeds(self, work: Work, seconds: float, waited: float) -> dict[str, float]:
        """Rates of some work of all processes in some seconds."""
        rates = {
            "tokens_per_second": round(work.tokens / seconds, 1),
            "images_per_second": round(work.images / seconds, 3),
            "rows_per_second": round(work.rows / seconds, 3),
            "data_wait": round(waited / seconds, 4),
        }
        if self._peak:
            flops = self.counter.flops(work) / seconds / self.trainer.accelerator.num_processes
            rates["mfu"] = round(flops / self._peak, 4)
            rates["tflops_per_gpu"] = round(flops / 1e12, 1)
        if torch.cuda.is_available() and self.trainer.args.device.type == "cuda":
            rates["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return rates

    def _pause(self) -> None:
        if self._began is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._elapsed += time.perf_counter() - self._began
            self._began = None


class Progress(ProgressCallback):
    """The Trainer's bar, with a short line for each log instead of a dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "train_runtime" not in logs:
            self.training_bar.write(format_log(state.global_step, state.max_steps, logs))


def format_log(step: int, max_steps: int, logs: dict[str, Any]) -> str:
    """One log entry in at most 80 columns."""
    names = {
        "loss": ("loss", "{:.4f}"),
        "eval_loss": ("eval loss", "{:.4f}"),
        "eval_mean_token_accuracy": ("right tokens", "{:.1%}"),
        "learning_rate": ("lr", "{:.1e}"),
        "tokens_per_second": ("", "{:,.0f} tok/s"),
        "images_per_second": ("", "{:.1f} img/s"),
        "data_wait": ("wait", "{:.1%}"),
        "mfu": ("mfu", "{:.0%}"),
    }
    parts = [f"{label} {style.format(logs[key])}".strip() for key, (label, style) in names.items() if key in logs]
    return f"{step:>{len(str(max_steps))}}/{max_steps}  " + "  ".join(parts)
