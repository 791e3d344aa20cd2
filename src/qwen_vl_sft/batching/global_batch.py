"""The batch of an optimizer step over all processes: a number of rows, or a number of tokens in whole rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from qwen_vl_sft.config.reading import Recipe


@dataclass(frozen=True)
class GlobalBatch:
    """The size of an optimizer step: either `rows`, or about as many `tokens`."""

    rows: int | None = None
    tokens: int | None = None

    def steps(self, lengths: np.ndarray) -> int:
        """Return the steps of an epoch of rows with these lengths in tokens; the same for every order of them."""
        if self.rows is not None:
            return math.ceil(len(lengths) / self.rows)
        assert self.tokens is not None
        return math.ceil(int(lengths.sum()) / self.tokens)

    def split(self, lengths: np.ndarray) -> list[slice]:
        """Return the rows of each step of an epoch that takes them in this order.

        Steps by tokens are as equal as whole rows allow, without a small remainder: the epoch is cut into equal parts, and a
        row belongs to the part that contains its middle. A part has at most `tokens` tokens; a step may have up to half a
        row more or less at either end.
        """
        if self.rows is not None:
            return [slice(start, start + self.rows) for start in range(0, len(lengths), self.rows)]
        count = self.steps(lengths)
        ends = lengths.cumsum()
        edges = np.searchsorted(ends - lengths / 2, ends[-1] * np.arange(count + 1) / count)
        return [slice(int(start), int(stop)) for start, stop in itertools.pairwise(edges)]

    def most(self, lengths: np.ndarray) -> tuple[int, int]:
        """Return the rows and tokens that no step exceeds."""
        if self.rows is not None:
            return self.rows, int(lengths.sum())
        assert self.tokens is not None
        return len(lengths), self.tokens + int(lengths.max())

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.rows is not None else f"{self.tokens:,} tokens"


def resolve_batch(recipe: Recipe, processes: int) -> GlobalBatch:
    """Return what one optimizer step takes over all processes."""
    run = recipe.run
    if run.global_batch_tokens is not None:
        return GlobalBatch(tokens=run.global_batch_tokens)
    if run.global_batch_size is not None:
        return GlobalBatch(rows=run.global_batch_size)
    per_step = recipe.get("per_device_train_batch_size") * processes
    return GlobalBatch(rows=per_step * recipe.get("gradient_accumulation_steps"))


def with_accumulation(recipe: Recipe, processes: int) -> Recipe:
    """Set `gradient_accumulation_steps` from `global_batch_size`, for padded batches.

    Packed steps are planned by their tokens instead.
    """
    rows = recipe.run.global_batch_size
    if recipe.run.packing or rows is None:
        return recipe
    per_step = recipe.get("per_device_train_batch_size") * processes
    return recipe.with_training(gradient_accumulation_steps=rows // per_step)
