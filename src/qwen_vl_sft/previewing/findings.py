"""What in the data would make training fail, and what may not be meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_vl_sft.batching.fit import problems_of_lengths
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.families.base import resized_image
from qwen_vl_sft.previewing.checked_split import CheckedSplit
from qwen_vl_sft.previewing.statistics import Overlap, odd_images
from qwen_vl_sft.previewing.summary import SplitSummary

# Rows of each kind that are told.
_TOLD = 5
# The longest row of most data is a few times as long as half of the rows.
_FAR_LONGER = 8
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S+|\d[\d,.]*")


@dataclass(frozen=True)
class Finding:
    """What was found in a split: in one line, with some of the rows, and for a problem the way out."""

    split: str
    text: str
    rows: tuple[str, ...] = ()
    way_out: str = ""


def problems_of(recipe: Recipe, split: CheckedSplit) -> Iterator[Finding]:
    """Yield what would make training fail."""
    data, total = recipe.data, len(split.rows)
    if not split.is_good.any():
        yield Finding(split.name, f"none of {total:,} rows can be used", way_out="see the reasons of its rows")
    if data.bad_rows == "error":
        yield from _bad_rows(split, "fix them, or set bad_rows: skip to leave them out")
    if data.overlong == "error":
        yield from _long_rows(recipe, split, "raise max_length, lower max_pixels, or set overlong: drop")
    if split.name == "train" and split.is_good.any():
        kept = split.rows if split.is_good.all() else split.rows.select(split.is_good.nonzero()[0].tolist())
        for text in problems_of_lengths(kept, split.lengths, recipe.run, 1):
            what, _, way_out = text.partition("; ")
            yield Finding(split.name, what, way_out=way_out)


def _bad_rows(split: CheckedSplit, way_out: str) -> Iterator[Finding]:
    """Yield the rows that cannot be used, by the reason."""
    is_bad = ~split.is_good & ~split.is_long
    lines = split.found.select([ROW_ID, "problem"]).filter(pa.array(is_bad)).to_pylist()
    kinds: dict[str, list[str]] = {}
    for line in lines:
        problem = _in_folder(line["problem"], split.rows)
        kinds.setdefault(_VARYING.sub("", problem), []).append(f"row {line[ROW_ID]} {problem}")
    for rows in sorted(kinds.values(), key=len, reverse=True):
        text = f"{_rows_of(len(rows), len(split.rows))} cannot be used"
        yield Finding(split.name, text, tuple(rows[:_TOLD]), way_out)


def _in_folder(problem: str, rows: Rows) -> str:
    """Return a problem with paths as they are below the data folder."""
    if rows.folder is None:
        return problem
    for folder in (rows.folder.resolve(), rows.folder.absolute()):
        problem = problem.replace(f"{folder}/", "")
    return problem


def _long_rows(recipe: Recipe, split: CheckedSplit, way_out: str) -> Iterator[Finding]:
    if not split.is_long.any():
        return
    lines = split.found.filter(pa.array(split.is_long))
    order = np.argsort(-np.asarray(lines["tokens"]), kind="stable")[:_TOLD]
    told = [f"row {lines[ROW_ID][int(place)]} has {lines['tokens'][int(place)].as_py():,} tokens" for place in order]
    text = f"{_rows_of(len(lines), len(split.rows))} above max_length {recipe.data.max_length:,}"
    yield Finding(split.name, text, tuple(told), way_out)


def notes_of(recipe: Recipe, split: CheckedSplit, image_processor: Any) -> Iterator[Finding]:
    """Yield what does not make training fail and may not be meant."""
    data = recipe.data
    if data.bad_rows == "skip":
        yield from _bad_rows(split, "bad_rows: skip leaves them out")
    if data.overlong == "drop":
        yield from _long_rows(recipe, split, "overlong: drop leaves them out")
    images, row_ids = split.images, split.row_ids(split.measured)
    sizes, number = np.unique(images.sides, axis=0, return_inverse=True)
    if len(sizes):
        each = np.array([resized_image(int(width), int(height), image_processor) for width, height in sizes])
        resized = each[number.reshape(-1)]
        for odd in odd_images(images.sides, resized, images.distinct):
            told = tuple(
                f"row {row_ids[images.row[place]]}: {_pixels(images.sides[place])}, {_pixels(resized[place])} for the model"
                for place in odd.places
            )
            yield Finding(split.name, f"{odd.images:,} of {len(images.distinct):,} images {odd.what}", told)
    tokens = np.asarray(split.measured["tokens"])
    if len(tokens) and tokens.max() > (limit := _FAR_LONGER * float(np.median(tokens))):
        order = np.argsort(-tokens, kind="stable")[: min(_TOLD, int((tokens > limit).sum()))]
        told = tuple(f"row {row_ids[place]} has {tokens[place]:,} tokens" for place in order)
        text = f"{_rows_of(int((tokens > limit).sum()), len(tokens))}: more than {_FAR_LONGER} times the tokens of most rows"
        yield Finding(split.name, text, told)


def _rows_of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} rows"


def _pixels(sides: np.ndarray) -> str:
    return f"{sides[0]} x {sides[1]} pixels"


def notes_of_equal_rows(summaries: tuple[SplitSummary, ...], overlap: Overlap | None) -> Iterator[Finding]:
    """Yield which rows repeat others of their split, and which of evaluation those of training."""
    if overlap is not None and overlap.rows:
        told = tuple(f"row {ours} asks what training row {theirs} asks" for ours, theirs in overlap.pairs)
        text = f"{_rows_of(overlap.rows, summaries[1].usable)} also in training: the same question on the same images"
        yield Finding("evaluation", text, told, "evaluate on other rows, else the scores tell nothing of new ones")
    if overlap is not None and overlap.shown:
        text = f"{_rows_of(overlap.shown, summaries[1].usable)}: other questions on images of training rows"
        yield Finding("evaluation", text)
    for summary in summaries:
        repeats = summary.repeats
        if repeats.rows:
            told = tuple(
                f"row {later} asks what row {first} asks, {'with the same answer' if same else 'and answers otherwise'}"
                for later, first, same in repeats.pairs
            )
            text = f"{_rows_of(repeats.rows, summary.usable)}: an earlier row asks the same of the same images"
            if repeats.contradicted:
                text += f"; questions with several answers: {repeats.contradicted:,}"
            yield Finding(summary.name, text, told)
