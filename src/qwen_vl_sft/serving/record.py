"""What a check of serving found, kept in the run's folder for the model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write

FOLDER = "serving"
ADAPTER, FULL, MERGED = "adapter", "full model", "merged model"
NF4_AWARE, FP8_AWARE = "nf4_aware merged model", "fp8_aware merged model"
# Merges that keep the quantized weights of training.
AS_TRAINED = (NF4_AWARE, FP8_AWARE)


def form_of(merge: dict[str, Any] | None, is_adapter: bool) -> str:
    """Return the form of a model, given the report of its merge if it is merged."""
    if merge is None:
        return ADAPTER if is_adapter else FULL
    return NF4_AWARE if merge.get("nf4_aware") else FP8_AWARE if merge.get("fp8_aware") else MERGED


def record_file(home: Path, engine: str, what: str) -> Path:
    """Return the file of an engine and a form of the model (`ADAPTER`, ...)."""
    return home / FOLDER / f"{engine}_{what.replace(' ', '_')}.json"


def write_record(home: Path, record: dict[str, Any]) -> Path:
    """Write a record, and return its file. Raises `OSError`."""
    path = record_file(home, record["engine"], record["what"])
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return path


def read_records(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the records in these folders with the time they were written, as `finished`; what cannot be read is none."""
    for folder in folders:
        for path in sorted((folder / FOLDER).glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and {"engine", "what", "proven", "weights"} <= set(record):
                yield record | {"finished": path.stat().st_mtime}
