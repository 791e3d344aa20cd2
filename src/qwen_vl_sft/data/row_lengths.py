"""Lengths of rows in tokens and image patches, for one row and for all rows of a split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np


@dataclass(frozen=True)
class RowLength:
    """The costs of a row, known without its pixels: tokens in all, tokens of the loss, images, vision patches.

    `prefix` is equal in rows that begin alike up to their last image before any answer (images, text and all), and
    empty in a row without one; `prefix_tokens` and `prefix_patches` are the costs of that beginning. `opening` is equal in
    rows that begin with the same text before the first of these images, and empty in a row without one; `opening_tokens`
    are those of that text. `answer_tokens` are those of the answers that are learned, whatever the loss is on.

    When they were asked for, `content_hashes` and `image_patches` have an entry an image, `image_sides` two, its width and
    its height; `question` and `answer` are those of `row_digests`.
    """

    tokens: int
    target_tokens: int
    images: int
    patches: int
    prefix: str
    prefix_tokens: int
    prefix_patches: int
    opening: str
    opening_tokens: int
    content_hashes: list[str] = field(default_factory=list)
    image_patches: list[int] = field(default_factory=list)
    image_sides: list[int] = field(default_factory=list)
    question: str = ""
    answer: str = ""
    answer_tokens: int = 0


@dataclass(frozen=True)
class RowLengths:
    """The costs of rows: int64 arrays with an entry a row, but for one number.

    `tokens`, `target_tokens`, `images` and `patches` of the whole row; of its beginning up to the question, which other
    rows may have too, the number of the `prefix` (-1 for a row without one), its `prefix_tokens` and `prefix_patches`.
    `opening_tokens` are those of the text that all rows begin with before their first image, 0 where they do not.
    """

    tokens: np.ndarray
    target_tokens: np.ndarray
    images: np.ndarray
    patches: np.ndarray
    prefix: np.ndarray
    prefix_tokens: np.ndarray
    prefix_patches: np.ndarray
    opening_tokens: int = 0

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.tokens)

    def select(self, chosen: np.ndarray) -> RowLengths:
        """Return the chosen rows alone, or rows several times; they begin as all do."""
        columns = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "opening_tokens"}
        return replace(self, **{name: column[chosen] for name, column in columns.items()})

    def without_patches(self) -> RowLengths:
        """Return the same rows where images cost nothing but their tokens."""
        none = np.zeros_like(self.patches)
        return replace(self, patches=none, prefix_patches=none)

    def without_opening(self) -> RowLengths:
        """Return the same rows as if they began differently, for a model that shares no openings."""
        return replace(self, opening_tokens=0)

    def of(self, group: list[int]) -> np.ndarray:
        """Return tokens and patches of a group of rows, whose prefix counts once: [2] float64."""
        first, repeats = group[0], len(group) - 1
        tokens = self.tokens[group].sum() - repeats * self.prefix_tokens[first]
        patches = self.patches[group].sum() - repeats * self.prefix_patches[first]
        return np.array([tokens, patches], dtype=np.float64)

    def of_each(self, groups: Sequence[Sequence[int]]) -> np.ndarray:
        """Return what `of` does for each of G groups: [G, 2] float64."""
        counts = np.fromiter(map(len, groups), np.int64, len(groups))
        rows = np.fromiter(itertools.chain.from_iterable(groups), np.int64, int(counts.sum()))
        starts = counts.cumsum() - counts
        first, repeats = rows[starts], counts - 1
        tokens = np.add.reduceat(self.tokens[rows], starts) - repeats * self.prefix_tokens[first]
        patches = np.add.reduceat(self.patches[rows], starts) - repeats * self.prefix_patches[first]
        return np.stack([tokens, patches], axis=1).astype(np.float64)
