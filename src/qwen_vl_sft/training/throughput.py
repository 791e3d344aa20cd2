"""Speed of training, measured over all processes: tokens, images, waiting for data, memory and MFU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qwen_vl_sft.modeling.flops import BatchStats, FlopCounter, peak_flops


class ThroughputMeter:
    """Adds up work and seconds between logs and over a whole run; evaluation and saving are not counted.

    Args:
        device: where the model computes.
        counter: counts the model's FLOPs, for TFLOP/s and, on a known GPU, MFU; None for neither.
    """

    def __init__(self, device: torch.device, counter: FlopCounter | None = None) -> None:
        self.counter = counter
        self.device = device
        self.work = BatchStats()  # of this process since the last measure
        self.waited = 0.0  # seconds this process waited for data since the last measure
        self.total = BatchStats()  # of all processes
        self.total_seconds = 0.0
        self.total_waited = 0.0
        self.peak_memory = 0  # bytes, of the process that has needed most so far; on GPUs only
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._began: float | None = None
        self._elapsed = 0.0

    def resume(self) -> None:
        """Let the clock run, if it does not."""
        if self._began is None:
            self._began = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock once the device has finished its work."""
        if self._began is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._elapsed += time.perf_counter() - self._began
            self._began = None

    def add(self, stats: BatchStats) -> None:
        """Count the work of a micro-batch of this process."""
        self.work += stats

    def add_wait(self, seconds: float) -> None:
        """Count seconds that this process waited for data."""
        self.waited += seconds

    def measure(self, accelerator: Any) -> dict[str, float]:
        """Return the speed of all processes since the last call, as log entries. All processes must call at once."""
        self.pause()
        seconds, self._elapsed = self._elapsed, 0.0
        work, waited = self._of_all(accelerator)
        if self.device.type == "cuda":
            peak = torch.tensor([torch.cuda.max_memory_allocated(self.device)], device=self.device)
            self.peak_memory = max(self.peak_memory, int(accelerator.gather(peak).max()))
        self.work, self.waited = BatchStats(), 0.0
        self.total += work
        self.total_seconds += seconds
        self.total_waited += waited
        return self.speeds(work, seconds, waited, accelerator.num_processes) if seconds and work.rows else {}

    def _of_all(self, accelerator: Any) -> tuple[BatchStats, float]:
        """Return the work of all processes since the last measure, and the seconds that one waited on average."""
        numbers = torch.tensor([*vars(self.work).values(), self.waited], dtype=torch.float64, device=self.device)
        *work, waited = accelerator.reduce(numbers, reduction="sum").tolist()
        return BatchStats(*map(int, work)), waited / accelerator.num_processes

    def totals(self, accelerator: Any) -> dict[str, Any]:
        """Return what all processes have done in the whole run, as plain numbers. All processes must call at once."""
        self.pause()
        work, waited = self._of_all(accelerator)
        return {
            "work": (self.total + work).stored(),
            "seconds": self.total_seconds + self._elapsed,
            "waited": self.total_waited + waited,
            "peak_memory": self.peak_memory,
        }

    def restore(self, totals: Mapping[str, Any]) -> None:
        """Count on from what `totals` gave at the checkpoint that a run is resumed from."""
        self.total, self.peak_memory = BatchStats.read(totals["work"]), totals["peak_memory"]
        self.total_seconds, self.total_waited = totals["seconds"], totals["waited"]

    def summary(self, processes: int) -> dict[str, float]:
        """Return the speed over the whole run."""
        if not self.total_seconds:
            return {}
        return self.speeds(self.total, self.total_seconds, self.total_waited, processes)

    def speeds(self, work: BatchStats, seconds: float, waited: float, processes: int) -> dict[str, float]:
        """Return the rates of some work of all processes in some seconds; `data_wait` is a share of the seconds.

        `peak_memory_gib` is that of the process that needed most, since the beginning of the run.
        """
        rates = {
            "tokens_per_second": round(work.tokens / seconds, 1),
            "images_per_second": round(work.images / seconds, 3),
            "rows_per_second": round(work.rows / seconds, 3),
            "data_wait": round(waited / seconds, 4),
        }
        if self.device.type == "cuda" and self.counter:
            flops = self.counter.flops(work) / seconds / processes
            rates["tflops_per_gpu"] = round(flops / 1e12, 1)
            if self._peak:
                rates["mfu"] = round(flops / self._peak, 4)
        if self.device.type == "cuda":
            rates["peak_memory_gib"] = round(self.peak_memory / 2**30, 2)
        return rates


class TimedIterator:
    """An iterator that adds up the seconds its source takes."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self.source)
        finally:
            self.seconds += time.perf_counter() - began
