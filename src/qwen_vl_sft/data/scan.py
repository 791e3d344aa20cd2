"""Scanning a split before training: every row is checked and measured. No pixels reach the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.row_checks import COUNTS, Checks, check_rows
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.errors import UserError

_SHOWN = 5


@dataclass(frozen=True)
class Scan:
    """Rows that can be used, their lengths in the same order, and the rows that were left out with their reasons.

    `kept` holds the indices of the rows in the scanned data. `content_hashes` and `image_patches` have one list per row,
    with one entry per image; they are empty unless the scan was asked for them.
    """

    rows: Rows
    kept: np.ndarray
    lengths: RowLengths
    bad: list[str]
    overlong: list[str]
    content_hashes: list[list[str]] = field(default_factory=list)
    image_patches: list[list[int]] = field(default_factory=list)

    @property
    def filler(self) -> int:
        """Return the row with an image that costs least, to fill up a batch; any cheapest row when none has an image."""
        lengths = self.lengths
        cost = lengths.tokens + np.where(lengths.images > 0, 0, lengths.tokens.max() + 1)
        return int(cost.argmin())

    def summary(self) -> dict[str, int]:
        """Return counts for the run's summary."""
        return {
            "rows": len(self.rows),
            "skipped_bad_rows": len(self.bad),
            "dropped_overlong_rows": len(self.overlong),
            "tokens": int(self.lengths.tokens.sum()),
            "learned_tokens": int(self.lengths.target_tokens.sum()),
            "images": int(self.lengths.images.sum()),
            "longest_row_tokens": int(self.lengths.tokens.max()),
        }


def scan(
    rows: Rows,
    encoder: Encoder,
    verify_images: bool = True,
    skip_bad_rows: bool = False,
    drop_overlong: bool = False,
    num_proc: int | None = None,
    content_hashes: bool = False,
) -> Scan:
    """Check and measure every row; what is found is kept on disk. `content_hashes` also identifies images.

    `num_proc` processes work on it, all cores for None. Raises `UserError` that names the rows that cannot be used, unless
    they are to be skipped, and when none is left.
    """
    found = check_rows(rows, Checks(encoder, verify_images, content_hashes), num_proc)
    is_good = found["problem"].is_null().to_numpy()
    is_long = found["overlong"].to_numpy()
    bad_rows, long_rows = named_problems(rows, found, ~is_good & ~is_long), named_problems(rows, found, is_long)
    if bad_rows and not skip_bad_rows:
        raise _refusal(bad_rows, len(rows), "cannot be used", "fix them, or set bad_rows: skip to leave them out")
    if long_rows and not drop_overlong:
        out = "raise max_length, lower max_pixels, or set overlong: drop to leave them out"
        raise _refusal(long_rows, len(rows), "are too long", out)
    kept = is_good.nonzero()[0]
    if not len(kept):
        (first,) = named_problems(rows, found.slice(0, 1), np.array([True]))
        raise UserError(f"{rows.name}: none of its {len(rows)} rows can be used; the first: {first}")
    # Nearly always all: a list of places would then cost more than it says.
    usable = found if is_good.all() else found.filter(pa.array(is_good))
    lengths = row_lengths(usable)
    images: dict[str, Any] = {}
    if content_hashes:
        images = {name: usable[name].to_pylist() for name in ("content_hashes", "image_patches")}
    kept_rows = rows if is_good.all() else rows.select(kept.tolist())
    return Scan(kept_rows, kept, lengths, bad_rows, long_rows, **images)


def row_lengths(found: pa.Table) -> RowLengths:
    """Return the lengths of the rows that `check_rows` found something in."""
    counts: dict[str, Any] = {name: found[name].to_numpy() for name in COUNTS}
    alike = pc.count_distinct(found["opening"]).as_py() == 1
    opening_tokens = found["opening_tokens"][0].as_py() if alike else 0
    return RowLengths(**counts, prefix=_number_prefixes(found["prefix"]), opening_tokens=opening_tokens)


def named_problems(rows: Rows, found: pa.Table, chosen: np.ndarray) -> list[str]:
    """Return names and problems of the chosen rows, of those that `check_rows` found."""
    told = found.select([ROW_ID, "problem"]).filter(pa.array(chosen)).to_pylist()
    return [f"{rows.name_of(row[ROW_ID])} {row['problem']}" for row in told]


def _number_prefixes(prefixes: pa.ChunkedArray) -> np.ndarray:
    """Give numbers to `RowLength.prefix` of rows in order of appearance, -1 for an empty one: [rows] int64."""
    encoded = pc.if_else(pc.equal(prefixes, ""), None, prefixes).combine_chunks().dictionary_encode()
    numbers: np.ndarray = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    return numbers


def _refusal(named: list[str], total: int, what: str, way_out: str) -> UserError:
    shown = "".join(f"\n    {text}" for text in named[:_SHOWN])
    more = f"\n    and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return UserError(f"{len(named)} of {total} rows {what}; {way_out}:{shown}{more}")
