"""What the rules of a recipe need to know of its launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from qwen_vl_sft.config.reading import Recipe


class Launched(Protocol):
    """A launch: the strategy, its processes, and whether they have no GPU. A running one, or one that is planned."""

    @property
    def strategy(self) -> str:
        """Return single, ddp, zero1, zero2, zero3 or fsdp2."""
        ...

    @property
    def processes(self) -> int:
        """Return the number of processes on all machines."""
        ...

    @property
    def on_cpu(self) -> bool:
        """Return whether they compute on the CPU."""
        ...


Rule = Callable[[Recipe, Launched], Iterator[str]]
