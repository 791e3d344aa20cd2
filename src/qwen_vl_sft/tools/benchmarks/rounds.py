"""Variants in turns, round after round in one process: what disturbs the machine disturbs all of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_vl_sft.modeling.flops import peak_flops
from qwen_vl_sft.tools.benchmarks.table import TEXT, format_table
from qwen_vl_sft.tools.benchmarks.variants import Variant, timed_fetching

COLUMNS = {
    "variant": ("variant", TEXT),
    "rows_per_second": ("rows/s", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "ratio": ("ratio", "{:.2f}"),
    "tflops": ("useful TFLOP/s", "{:.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "data_wait": ("waiting for data", "{:.1%}"),
}


@dataclass(frozen=True)
class Mark:
    """A moment of a run: seconds, seconds waited, rows and useful FLOPs so far."""

    seconds: float
    waited: float
    rows: int
    flops: float


class Clock(TrainerCallback):
    """Times the steps after `warmup` of them; the device has done its work at both ends."""

    def __init__(self, warmup: int, variant: Variant, waited: list[float]) -> None:
        self.warmup = warmup
        self.variant = variant
        self.waited = waited
        self.marks: list[Mark] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the end of the warm-up and of the last step."""
        if state.global_step == self.warmup or state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            done = self.variant.work_done(state.global_step)
            self.marks.append(Mark(time.perf_counter(), self.waited[0], done.rows, self.variant.counter.flops(done)))


def measure(variant: Variant, steps: int, warmup: int, order: int = 0) -> dict[str, float]:
    """Train `warmup` and `steps` steps of the rows in some order, and return the speed of the latter."""
    variant.reorder(order)
    trainer, cuda = variant.trainer, torch.cuda.is_available()
    trainer.args.max_steps = warmup + steps
    others = 0
    if cuda:
        torch.cuda.empty_cache()
        others = torch.cuda.memory_allocated() - variant.bytes_of_weights
        torch.cuda.reset_peak_memory_stats()
    with timed_fetching(trainer) as waited:
        clock = Clock(warmup, variant, waited)
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)
    began, ended = clock.marks
    seconds, rows = ended.seconds - began.seconds, ended.rows - began.rows
    found = {
        "rows_per_second": rows / seconds,
        "tokens_per_second": rows * variant.tokens_per_row / seconds,
        "data_wait": (ended.waited - began.waited) / seconds,
        "tflops": (ended.flops - began.flops) / seconds / 1e12,
        "loss": trainer.state.log_history[-1].get("train_loss", float("nan")),
    }
    if cuda:
        found["peak_memory_gib"] = (torch.cuda.max_memory_allocated() - others) / 2**30
    return found


def summarise(rounds: Sequence[dict[str, dict[str, float]]], reference: str) -> list[dict[str, Any]]:
    """Medians over the rounds of each variant, and how many times as fast as `reference` it is in the same round."""
    results = []
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    for name in rounds[0]:
        found: dict[str, Any] = {"variant": name}
        for key in rounds[0][name]:
            found[key] = statistics.median(one[name][key] for one in rounds)
        found["ratio"] = statistics.median(
            one[name]["rows_per_second"] / one[reference]["rows_per_second"] for one in rounds
        )
        if peak:
            found["mfu"] = found["tflops"] * 1e12 / peak
        results.append(found)
    return results


def write_results(folder: Path, results: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write results.json, results.md and speed.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**about, "results": results}, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(format_table(results, COLUMNS) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(results) + 1.2), layout="constrained")
    names, speeds = [result["variant"] for result in results], [result["rows_per_second"] for result in results]
    bars = axes.barh(names, speeds, color="#2563eb")
    axes.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows a second")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "speed.png", dpi=150)
    pyplot.close(figure)
