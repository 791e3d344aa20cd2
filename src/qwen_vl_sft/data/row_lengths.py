"""Lengths of rows in tokens and image patches, for one row and for all rows of a split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True)
class RowLength:
    """What a row costs, known without its pixels: tokens in all, tokens learned, images, vision patches.

    `prefix` is equal in rows that begin alike up to their last image before any answer (images, text and all), and
    empty in a row without one; `prefix_tokens` and `prefix_patches` are what that beginning costs. When they were asked
    for, `image_keys` and `image_patches` have an entry an image (`EncodedImage.key`).
    """

    tokens: int
    learned: int
    images: int
    patches: int
    prefix: str
    prefix_tokens: int
    prefix_patches: int
    image_keys: list[str] = field(default_factory=list)
    image_patches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RowLengths:
    """What rows cost: int64 arrays with an entry a row.

    `tokens` and `patches` of the whole row; of its beginning up to the question, which other rows may have too, the
    number of the `prefix` (-1 for a row without one) and its `prefix_tokens` and `prefix_patches`.
    """

    tokens: np.ndarray
    patches: np.ndarray
    prefix: np.ndarray
    prefix_tokens: np.ndarray
    prefix_patches: np.ndarray

    def without_patches(self) -> RowLengths:
        """The same rows where images cost nothing but their tokens."""
        none = np.zeros_like(self.patches)
        return replace(self, patches=none, prefix_patches=none)

    def of(self, group: list[int]) -> np.ndarray:
        """Tokens and patches of a group: its prefix counts once."""
        first, repeats = group[0], len(group) - 1
        tokens = self.tokens[group].sum() - repeats * self.prefix_tokens[first]
        patches = self.patches[group].sum() - repeats * self.prefix_patches[first]
        return np.array([tokens, patches], dtype=np.float64)
