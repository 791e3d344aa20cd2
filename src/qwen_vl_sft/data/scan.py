"""A look at every row before training: which can be used, and how long each is. No pixels reach the model."""

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
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.data.rows import FORMATS
from qwen_vl_sft.errors import BadRow, OverLongRow, UserError

COUNTS = ("tokens", "learned", "images", "patches", "prefix_tokens", "prefix_patches")
_FEATURES = Features(
    {
        "problem": Value("string"),
        "overlong": Value("bool"),
        "prefix": Value("string"),
        **{name: Value("int64") for name in (ROW_ID, *COUNTS)},
        "image_keys": List(Value("string")),
        "image_patches": List(Value("int64")),
    }
)
_SHOWN = 5
# Raise it when rows are read, refused or measured otherwise than before: cached scans are then not used.
_FORMAT = 3


@dataclass(frozen=True)
class Scan:
    """Rows that can be used, their lengths in the same order, and how many were left out and why.

    `kept` holds their places among the rows that were looked at. `tokens`, `learned`, `images`, `patches`,
    `prefix_tokens`, `prefix_patches` are int64 arrays with an entry a row; `prefix` numbers the beginnings that rows share
    (`Lengths.prefix`), -1 for none. `image_keys` and `image_patches` are lists with a list a row, which is empty unless
    the scan was asked for them.
    """

    rows: Rows
    kept: np.ndarray
    tokens: np.ndarray
    learned: np.ndarray
    images: np.ndarray
    patches: np.ndarray
    prefix: np.ndarray
    prefix_tokens: np.ndarray
    prefix_patches: np.ndarray
    bad: list[str]
    overlong: list[str]
    image_keys: list[list[str]] = field(default_factory=list)
    image_patches: list[list[int]] = field(default_factory=list)

    @property
    def filler(self) -> int:
        """The row with an image that costs least, to fill up a batch; any cheapest row when none has an image."""
        cost = self.tokens + np.where(self.images > 0, 0, self.tokens.max() + 1)
        return int(cost.argmin())

    @property
    def sizes(self) -> RowLengths:
        """What the rows cost, for packing."""
        return RowLengths(self.tokens, self.patches, self.prefix, self.prefix_tokens, self.prefix_patches)

    def summary(self) -> dict[str, int]:
        """Counts for the run's summary."""
        return {
            "rows": len(self.rows),
            "skipped_bad_rows": len(self.bad),
            "dropped_overlong_rows": len(self.overlong),
            "tokens": int(self.tokens.sum()),
            "learned_tokens": int(self.learned.sum()),
            "images": int(self.images.sum()),
            "longest_row_tokens": int(self.tokens.max()),
        }


def scan(
    rows: Rows,
    encoder: Encoder,
    verify_images: bool = True,
    skip_bad_rows: bool = False,
    drop_overlong: bool = False,
    num_proc: int | None = None,
    image_keys: bool = False,
) -> Scan:
    """Check and measure every row; results are cached beside the dataset. `image_keys` also tells its images apart.

    Raises `UserError` that names the rows that cannot be used, unless they are to be skipped, and when none is left.
    """
    found = _checked(rows, encoder, verify_images, num_proc, image_keys)
    columns = found.with_format("numpy")
    problems, overlong = list(found["problem"]), np.asarray(columns["overlong"])
    named = [f"{rows.where(row_id)} {problem}" for row_id, problem in zip(found[ROW_ID], problems, strict=True)]
    bad_rows = [text for text, problem, long in zip(named, problems, overlong, strict=True) if problem and not long]
    long_rows = [text for text, long in zip(named, overlong, strict=True) if long]
    if bad_rows and not skip_bad_rows:
        raise _refusal(bad_rows, len(rows), "cannot be used", "mend them, or set bad_rows: skip to leave them out")
    if long_rows and not drop_overlong:
        out = "raise max_length, lower max_pixels, or set overlong: drop to leave them out"
        raise _refusal(long_rows, len(rows), "are too long", out)
    kept = [index for index, problem in enumerate(problems) if not problem]
    if not kept:
        raise UserError(f"{rows.name}: none of its {len(rows)} rows can be used; the first: {named[0]}")
    lengths: dict[str, Any] = {name: np.asarray(columns[name])[kept] for name in COUNTS}
    prefixes = list(found["prefix"])
    prefix = _numbered([prefixes[index] for index in kept])
    images: dict[str, Any] = {}
    if image_keys:
        images = {name: found.select(kept)[name][:] for name in ("image_keys", "image_patches")}
    return Scan(rows.select(kept), np.array(kept), **lengths, prefix=prefix, bad=bad_rows, overlong=long_rows, **images)


def _numbered(names: list[str]) -> np.ndarray:
    """A number for each name in order of appearance, -1 for an empty one."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) if name else -1 for name in names], dtype=np.int64)


def _checked(rows: Rows, encoder: Encoder, verify_images: bool, num_proc: int | None, image_keys: bool) -> Dataset:
    assert isinstance(rows.dataset, Dataset)
    dataset = rows.dataset
    # Files that rows only point to can change without the dataset's fingerprint changing.
    holds_images = any("bytes" in str(feature) or "Image" in str(feature) for feature in dataset.features.values())
    return dataset.map(
        _check_row,
        fn_kwargs={"rows": rows.without_data(), "encoder": encoder, "decode": verify_images, "image_keys": image_keys},
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=num_proc if num_proc and num_proc > 1 and len(dataset) > num_proc else None,
        load_from_cache_file=holds_images,
        new_fingerprint=_fingerprint(rows, encoder, verify_images, image_keys),
        desc=f"Checking {rows.name}",
    )


def _check_row(raw: Mapping[str, Any], rows: Rows, encoder: Encoder, decode: bool, image_keys: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"problem": "", "overlong": False, ROW_ID: raw[ROW_ID]}
    try:
        conversation = FORMATS[rows.format](raw, rows.folder)
        return {**result, **asdict(encoder.measure(conversation, decode, image_keys))}
    except BadRow as error:
        return {
            **result,
            **dict.fromkeys(COUNTS, 0),
            "prefix": "",
            "image_keys": [],
            "image_patches": [],
            "problem": str(error),
            "overlong": isinstance(error, OverLongRow),
        }


def _fingerprint(rows: Rows, encoder: Encoder, verify_images: bool, image_keys: bool) -> str:
    """What the result of a scan depends on."""
    processor = encoder.processor
    parts = {
        "data": rows.dataset._fingerprint,
        "format": rows.format,
        "folder": str(rows.folder),
        "system_message": encoder.system_message,
        "train_on": encoder.train_on,
        "max_length": encoder.max_length,
        "verify_images": verify_images,
        "image_keys": image_keys,
        "chat_template": processor.chat_template,
        "image_processor": str(processor.image_processor.to_dict()),
        "tokenizer": hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "version": __version__,
        "scan": _FORMAT,
        "columns": sorted(_FEATURES),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _refusal(named: list[str], total: int, what: str, way_out: str) -> UserError:
    shown = "".join(f"\n    {text}" for text in named[:_SHOWN])
    more = f"\n    and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return UserError(f"{len(named)} of {total} rows {what}; {way_out}:{shown}{more}")
