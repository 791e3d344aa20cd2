"""Find evaluation rows that are training rows too, by what they say and show and not by their names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from qwen_vl_sft.data.dataset import even_indices
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import BadRow

# A part of the rows shows a split that was given twice, and most overlaps, in less than a second.
LOOKED_AT = 64
MOST_READ = 1000


def count_shared_rows(train: Scan, evaluation: Scan) -> tuple[int, int]:
    """Return how many of some evaluation rows, evenly spread, are training rows too, and how many were looked at.

    Equal rows have equal lengths, so only training rows of the same lengths are read: at most `MOST_READ`.
    """
    keys = _keys(train.lengths)
    order = np.argsort(keys, kind="stable")
    sample = np.asarray(even_indices(len(evaluation.rows), LOOKED_AT))
    wanted = _keys(evaluation.lengths)[sample]
    first, last = (np.searchsorted(keys[order], wanted, side=side) for side in ("left", "right"))
    texts: dict[int, str | None] = {}
    shared = looked_at = read = 0
    # Those with the fewest rows of their lengths first.
    for place in np.argsort(last - first, kind="stable"):
        read += int(last[place] - first[place])
        if read > MOST_READ:
            break
        looked_at += 1
        text = _text(evaluation, int(sample[place]))
        for index in map(int, order[first[place] : last[place]]):
            if index not in texts:
                texts[index] = _text(train, index)
            if (
                text is not None
                and texts[index] == text
                and _shows_the_same(train, index, evaluation, int(sample[place]))
            ):
                shared += 1
                break
    return shared, looked_at


def _keys(lengths: RowLengths) -> np.ndarray:
    """Return a number for each row, equal for rows of equal lengths."""
    key = np.zeros(len(lengths.tokens), dtype=np.uint64)
    for column in (lengths.tokens, lengths.target_tokens, lengths.images, lengths.patches):
        key = key * np.uint64(1_000_003) + np.asarray(column).astype(np.uint64)
    return key


def _conversation(scan: Scan, index: int) -> Any:
    return scan.rows.conversation(scan.rows.dataset[index])  # type: ignore[index]


def _text(scan: Scan, index: int) -> str | None:
    try:
        return json.dumps(_conversation(scan, index).messages)
    except BadRow:  # read since, by `bad_rows: skip`
        return None


def _shows_the_same(train: Scan, index: int, evaluation: Scan, place: int) -> bool:
    try:
        ours, theirs = _conversation(train, index).media, _conversation(evaluation, place).media
        return [item.content_hash for item in ours] == [item.content_hash for item in theirs]
    except BadRow:
        return False
