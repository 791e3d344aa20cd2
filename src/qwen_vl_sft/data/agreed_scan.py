"""One scan for all processes: they must train on the same rows, and one process has read every image."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from datasets import Dataset

from qwen_vl_sft.data.dataset import Rows, even_indices
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError

_SAMPLED = 64


def agreed_scan(context: DistributedContext, rows: Rows, look: Callable[[], Scan]) -> Scan:
    """Return what `look` finds on the first process, on all: a file that another cannot read changes no plan.

    Call it on all processes, joined (`launch.join`). Raises `UserError` on a process whose rows are others than those of
    the first, as where a machine has a copy of its own that is older.
    """
    if context.processes == 1:
        return look()
    if context.rank == 0:
        found = look()
        values = {field.name: getattr(found, field.name) for field in fields(Scan) if field.name != "rows"}
        launch.from_first(context, (len(rows), sample_digest(rows), values))
        return found
    count, digest, values = launch.from_first(context, None)
    if (len(rows), sample_digest(rows)) != (count, digest):
        what = f"{len(rows):,} rows, the first process {count:,}" if len(rows) != count else "other rows than the first"
        raise UserError(
            f"{rows.name}: process {context.rank} on {socket.gethostname()} finds {what}; have the same data on all"
            f" machines, best in a folder that they share (HF_HOME for datasets from the Hub)"
        )
    return Scan(rows=rows.select(values["kept"].tolist()), **values)


def sample_digest(rows: Rows) -> str:
    """Digest a few rows, evenly spread; the same rows give the same digest, wherever they lie."""
    assert isinstance(rows.dataset, Dataset)
    sample = rows.dataset.select(even_indices(len(rows), _SAMPLED))
    return hashlib.sha256(repr([_without_folders(row) for row in sample]).encode()).hexdigest()


def _without_folders(value: Any) -> Any:
    """Leave folders out of the paths of images, which may lead through a cache of this machine."""
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            return value["bytes"], PurePath(value["path"] or "").name
        return {name: _without_folders(part) for name, part in value.items()}
    return [_without_folders(part) for part in value] if isinstance(value, list) else value
