"""The batch of an optimizer step over all processes: a number of rows, or whole rows of about so many tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GlobalBatch:
    """One of the two: `rows` of a step, or the `tokens` that its rows come to."""

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

        Steps of so many tokens are as equal as whole rows allow, so that none is a remainder: an epoch is cut into equal
        parts, and a row belongs to the part in which its middle lies. A part has as many tokens as asked for at most, a
        step up to half a row more or less at either end.
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
