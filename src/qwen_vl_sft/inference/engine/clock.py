"""Time what an engine spends on towers, prompts, tokens and waiting, without waiting for the GPU itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

READING, TOWER, PROMPTS, TOKENS = "reading", "tower", "prompts", "tokens"
# Passed by the host while it waits; the others are passed by the device while it computes.
_ON_HOST = (READING,)


class Clock:
    """Seconds and number of the parts of an engine's work.

    "reading" is how long the engine had nothing to compute, since no row was read; "tower" images, "prompts" the
    language model's passes over packed prompts, "tokens" those of one new token a row.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._events: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done, or started on a GPU, in this block."""
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in _ON_HOST or not torch.cuda.is_available():
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.setdefault(name, []).append((start, end))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, once the device has computed all."""
        if self._events:
            torch.cuda.synchronize()
        on_device = {
            name: sum(start.elapsed_time(end) for start, end in events) / 1000 for name, events in self._events.items()
        }
        return {**self._seconds, **on_device}
