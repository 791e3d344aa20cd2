"""A split in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qwen_vl_sft.data.dataset import ROW_ID
from qwen_vl_sft.previewing.checked_split import CheckedSplit, images_of
from qwen_vl_sft.previewing.statistics import Identities, Repeats, Spread, find_repeats, spread


@dataclass(frozen=True)
class SplitSummary:
    """A split in numbers: rows in all and those that can be used; how their tokens and images spread.

    `questions_of_an_image` are rows that show the same one.
    """

    name: str
    source: str
    rows: int
    usable: int
    bad: int
    too_long: int
    distinct_images: int
    ignored_columns: tuple[str, ...]
    tokens: Spread | None
    image_tokens: Spread | None
    text_tokens: Spread | None
    answer_tokens: Spread | None
    images_of_a_row: Spread | None
    questions_of_an_image: Spread | None
    repeats: Repeats


def identities_of(usable: pa.Table) -> Identities:
    """Return what tells rows apart that can be used."""
    images = usable["content_hashes"].combine_chunks().flatten()
    return Identities(
        questions=_as_bytes(usable["question"]),
        answers=_as_bytes(usable["answer"]),
        row_ids=np.asarray(usable[ROW_ID]),
        images=_as_bytes(images),
        image_rows=images_of(usable).row,
    )


def _as_bytes(texts: pa.Array) -> np.ndarray:
    return np.asarray(texts.to_numpy(zero_copy_only=False) if len(texts) else [], dtype=np.bytes_)


def summarise(split: CheckedSplit, known: Identities) -> SplitSummary:
    """Count and measure the rows of a split; `known` tells those apart that can be used."""
    measured, usable, images = split.measured, split.usable, split.images
    tokens, of_images = np.asarray(measured["tokens"]), split.image_tokens(measured)
    counts = np.asarray(measured["images"])
    return SplitSummary(
        name=split.name,
        source=split.rows.name,
        rows=len(split.rows),
        usable=len(usable),
        bad=int((~split.is_good & ~split.is_long).sum()),
        too_long=int(split.is_long.sum()),
        distinct_images=len(images.distinct),
        ignored_columns=split.rows.ignored_columns,
        tokens=spread(tokens),
        image_tokens=spread(of_images[counts > 0]),
        text_tokens=spread(tokens - of_images),
        answer_tokens=spread(np.asarray(measured["answer_tokens"])),
        images_of_a_row=spread(counts),
        questions_of_an_image=spread(_rows_of_each(images.row, images.content)),
        repeats=find_repeats(known.questions, known.answers, known.row_ids),
    )


def _rows_of_each(rows: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Return how many rows show each image; one that shows it twice counts once."""
    if not len(content):
        return content
    shown = np.unique(np.stack([content, rows]), axis=1)[0]
    return np.bincount(shown)
