"""A split after every row was checked: which rows can be used, and what each has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.data.scan import row_lengths


@dataclass(frozen=True)
class Images:
    """Every image of every row, I of them: the place of its row, width and height [I, 2], and its content as a number."""

    row: np.ndarray
    sides: np.ndarray
    content: np.ndarray

    @property
    def distinct(self) -> np.ndarray:
        """Return the places of images that show something for the first time."""
        return np.unique(self.content, return_index=True)[1]


@dataclass(frozen=True)
class CheckedSplit:
    """What `check_rows` found in a split, with `content_hashes`.

    Args:
        name: "train" or "evaluation".
        rows: all of them.
        found: a line for each.
        patches_of_a_token: that become one token.
    """

    name: str
    rows: Rows
    found: pa.Table
    patches_of_a_token: int

    @cached_property
    def is_good(self) -> np.ndarray:
        """Return which rows can be used."""
        return np.asarray(self.found["problem"].is_null())

    @cached_property
    def is_long(self) -> np.ndarray:
        """Return which rows have more tokens than `max_length`, and nothing else against them."""
        return np.asarray(self.found["overlong"])

    @cached_property
    def usable(self) -> pa.Table:
        """Return the lines of the rows that can be used."""
        return self.found.filter(pa.array(self.is_good))

    @cached_property
    def measured(self) -> pa.Table:
        """Return the lines of the rows that have lengths: those that can be used, and those that are too long."""
        return self.found.filter(pa.array(self.is_good | self.is_long))

    @cached_property
    def lengths(self) -> RowLengths:
        """Return the lengths of the rows that can be used."""
        return row_lengths(self.usable)

    @cached_property
    def images(self) -> Images:
        """Return the images of the rows that have lengths."""
        return images_of(self.measured)

    def image_tokens(self, found: pa.Table) -> np.ndarray:
        """Return the tokens of the images of each row."""
        return np.asarray(found["patches"]) // self.patches_of_a_token

    def row_ids(self, found: pa.Table) -> np.ndarray:
        """Return the row ids of lines."""
        return np.asarray(found[ROW_ID])


def images_of(found: pa.Table) -> Images:
    """Return the images of rows, from lines that `check_rows` wrote."""
    hashes = found["content_hashes"].combine_chunks()
    content = hashes.flatten().dictionary_encode().indices
    return Images(
        row=np.asarray(pc.list_parent_indices(hashes)).astype(np.int64),
        sides=np.asarray(found["image_sides"].combine_chunks().flatten()).reshape(-1, 2),
        content=np.asarray(content).astype(np.int64),
    )
