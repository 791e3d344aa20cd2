"""Scanning a split before training: every row is checked and measured. No pixels reach the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from qwen_vl_sft import __version__
from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.row_lengths import RowLengths, number_prefixes
from qwen_vl_sft.errors import BadRow, OverLongRow, UserError

_COUNTS = ("tokens", "target_tokens", "images", "patches", "prefix_tokens", "prefix_patches")
_FEATURES = Features(
    {
        "problem": Value("string"),
        "overlong": Value("bool"),
        "prefix": Value("string"),
        **{name: Value("int64") for name in (ROW_ID, *_COUNTS)},
        "content_hashes": List(Value("string")),
        "image_patches": List(Value("int64")),
    }
)
_SHOWN = 5
# Raise it when reading, refusing or measuring of rows changes: cached scans are then ignored.
_VERSION = 5


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
        """The row with an image that costs least, to fill up a batch; any cheapest row when none has an image."""
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
    """Check and measure every row; results are cached with the dataset. `content_hashes` also identifies images.

    Raises `UserError` that names the rows that cannot be used, unless they are to be skipped, and when none is left.
    """
    found = _checked(rows, encoder, verify_images, num_proc, content_hashes)
    columns = found.with_format("numpy")
    problems, overlong = list(found["problem"]), np.asarray(columns["overlong"])
    named = [f"{rows.name_of(row_id)} {problem}" for row_id, problem in zip(found[ROW_ID], problems, strict=True)]
    bad_rows = [text for text, problem, long in zip(named, problems, overlong, strict=True) if problem and not long]
    long_rows = [text for text, long in zip(named, overlong, strict=True) if long]
    if bad_rows and not skip_bad_rows:
        raise _refusal(bad_rows, len(rows), "cannot be used", "fix them, or set bad_rows: skip to leave them out")
    if long_rows and not drop_overlong:
        out = "raise max_length, lower max_pixels, or set overlong: drop to leave them out"
        raise _refusal(long_rows, len(rows), "are too long", out)
    kept = [index for index, problem in enumerate(problems) if not problem]
    if not kept:
        raise UserError(f"{rows.name}: none of its {len(rows)} rows can be used; the first: {named[0]}")
    counts: dict[str, Any] = {name: np.asarray(columns[name])[kept] for name in _COUNTS}
    prefixes = list(found["prefix"])
    lengths = RowLengths(**counts, prefix=number_prefixes([prefixes[index] for index in kept]))
    images: dict[str, Any] = {}
    if content_hashes:
        images = {name: found.select(kept)[name][:] for name in ("content_hashes", "image_patches")}
    return Scan(rows.select(kept), np.array(kept), lengths, bad_rows, long_rows, **images)


def _checked(rows: Rows, encoder: Encoder, verify_images: bool, num_proc: int | None, content_hashes: bool) -> Dataset:
    assert isinstance(rows.dataset, Dataset)
    dataset = rows.dataset
    # Files that rows only point to can change without the dataset's fingerprint changing.
    holds_images = any("bytes" in str(feature) or "Image" in str(feature) for feature in dataset.features.values())
    return dataset.map(
        _check_row,
        fn_kwargs={
            "rows": rows.without_data(),
            "encoder": encoder,
            "decode": verify_images,
            "content_hashes": content_hashes,
        },
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=num_proc if num_proc and num_proc > 1 and len(dataset) > num_proc else None,
        load_from_cache_file=holds_images,
        new_fingerprint=_fingerprint(rows, encoder, verify_images, content_hashes),
        desc=f"Checking {rows.name}",
    )


def _check_row(
    raw: Mapping[str, Any], rows: Rows, encoder: Encoder, decode: bool, content_hashes: bool
) -> dict[str, Any]:
    result: dict[str, Any] = {"problem": "", "overlong": False, ROW_ID: raw[ROW_ID]}
    try:
        conversation = rows.format.read(raw, rows.folder)
        return {**result, **asdict(encoder.measure(conversation, decode, content_hashes))}
    except BadRow as error:
        return {
            **result,
            **dict.fromkeys(_COUNTS, 0),
            "prefix": "",
            "content_hashes": [],
            "image_patches": [],
            "problem": str(error),
            "overlong": isinstance(error, OverLongRow),
        }


def _fingerprint(rows: Rows, encoder: Encoder, verify_images: bool, content_hashes: bool) -> str:
    """Digest everything that the result of a scan depends on."""
    processor = encoder.processor
    parts = {
        "data": rows.dataset._fingerprint,
        "format": rows.format.name,
        "box_coordinates": rows.format.box_coordinates,
        "boxes": asdict(encoder.boxes),
        "ignored": sorted(rows.format.ignored),
        "folder": str(rows.folder),
        "system_message": encoder.system_message,
        "train_on": encoder.train_on,
        "max_length": encoder.max_length,
        "verify_images": verify_images,
        "content_hashes": content_hashes,
        "chat_template": processor.chat_template,
        "template_options": encoder.template_options,
        "image_processor": str(processor.image_processor.to_dict()),
        "tokenizer": hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "version": __version__,
        "scan": _VERSION,
        "columns": sorted(_FEATURES),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _refusal(named: list[str], total: int, what: str, way_out: str) -> UserError:
    shown = "".join(f"\n    {text}" for text in named[:_SHOWN])
    more = f"\n    and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return UserError(f"{len(named)} of {total} rows {what}; {way_out}:{shown}{more}")
