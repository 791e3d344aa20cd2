"""The mean sizes of training rows: measured by a check of all of them, or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_vl_sft.families.shape import VisionShape


@dataclass(frozen=True)
class RowSizes:
    """The mean sizes of training rows, and where they are from.

    Attributes:
        rows: rows of the training split.
        tokens: of a row, mean.
        tokens_squared: mean of their squares.
        target_tokens: mean.
        longest: tokens of the longest row.
        patches: of a row's images, mean.
        patches_squared: mean of the sum of each image's squared.
        images: of a row, mean.
        distinct_images: share of the images that are different ones.
        computed: share of the tokens that are computed once prefixes are shared, without openings.
        groups: prefixes, and rows without one, a row.
        opening: tokens of the text that all rows begin with before their first image, 0 where they do not.
        source: says where these are from.
    """

    rows: int
    tokens: float
    tokens_squared: float
    target_tokens: float
    longest: int
    patches: float
    patches_squared: float
    images: float
    distinct_images: float
    computed: float
    groups: float
    opening: int
    source: str

    def with_pixels(self, factor: float) -> RowSizes:
        """Return these rows with images of `factor` times the pixels."""
        cut = (1 - factor) * self.patches / 4
        tokens = self.tokens - cut
        return replace(
            self,
            tokens=tokens,
            tokens_squared=self.tokens_squared * (tokens / self.tokens) ** 2,
            longest=math.ceil(self.longest * tokens / self.tokens),
            patches=self.patches * factor,
            patches_squared=self.patches_squared * factor**2,
            # What rows share is nearly all image.
            computed=1 - (1 - self.computed) * factor * self.tokens / tokens,
        )


# ChartQA's training split with the tutorial's system message, as Qwen2-VL reads it.
ASSUMED = RowSizes(
    rows=28299,
    tokens=685,
    tokens_squared=485_000,
    target_tokens=4.5,
    longest=1200,
    patches=2237,
    patches_squared=5.38e6,
    images=1,
    distinct_images=0.6,
    computed=0.62,
    groups=0.6,
    opening=98,
    source="assumed: charts as in ChartQA",
)


def assumed_sizes(vision: VisionShape, least: int | None = None, most: int | None = None) -> RowSizes:
    """Return the sizes of `ASSUMED` rows with a model's patches and a recipe's limits of an image's pixels.

    Qwen2-VL's patches have 14 pixels a side. Every image is taken to have as many pixels as they have on average.
    """
    pixels = ASSUMED.patches * 14**2
    limited = max(least or 0, min(pixels, most or pixels))
    rows = ASSUMED.with_pixels(limited / pixels * (14 / vision.patch) ** 2)
    tokens = round(rows.tokens)
    return replace(rows, tokens=tokens, source=f"assumed: charts as in ChartQA, {tokens} tokens a row")


def measured_sizes(lengths: Any, images: Sequence[Any] = ()) -> RowSizes:
    """Return the sizes of rows from their `RowLengths`.

    Args:
        lengths: of all training rows.
        images: content hashes of each row's images, where they are known.
    """
    tokens, patches = lengths.tokens.astype(float), lengths.patches.astype(float)
    shown = lengths.images.clip(min=1)
    prefixes, first = _firsts(lengths)
    shared = float(((~first) * prefixes * lengths.prefix_tokens).sum())
    known = [name for row in images for name in row]
    # Rows with one prefix show the same images.
    distinct = len(set(known)) / len(known) if known else 1 - float(((~first) * prefixes).mean())
    return RowSizes(
        rows=len(tokens),
        tokens=float(tokens.mean()),
        tokens_squared=float((tokens**2).mean()),
        target_tokens=float(lengths.target_tokens.mean()),
        longest=int(tokens.max()),
        patches=float(patches.mean()),
        patches_squared=float((patches**2 / shown).mean()),
        images=float(lengths.images.mean()),
        distinct_images=distinct,
        computed=1 - shared / float(tokens.sum()),
        groups=float((first | ~prefixes).mean()),
        opening=lengths.opening_tokens,
        source="measured",
    )


def _firsts(lengths: Any) -> tuple[Any, Any]:
    """Return which rows have a prefix, and which are the first with theirs."""
    has = lengths.prefix >= 0
    first = has.copy()
    seen: set[int] = set()
    for place, number in enumerate(lengths.prefix.tolist()):
        first[place] = number not in seen
        seen.add(number)
    return has, first
