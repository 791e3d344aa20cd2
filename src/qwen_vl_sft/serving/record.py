"""What a check of serving found, kept in the run's folder for the model card."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.errors import UserError

FOLDER = "serving"
# Seconds that weights may be newer than their check: a copied folder has the times of the copy.
COPY_TOLERANCE = 60
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


@contextlib.contextmanager
def keeping_records(home: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--run: {home / FOLDER}, where what a check finds is kept, cannot be written: {error.strerror or error}; free"
            " space, or check a copy of the run"
        ) from None


def make_folder(home: Path) -> Path:
    """Make the folder of records in a run, and try that files can be written there. Raises `UserError`."""
    folder = home / FOLDER
    with keeping_records(home):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    return folder


def write_record(home: Path, record: dict[str, Any]) -> Path:
    """Write a record, and return its file. Raises `UserError`."""
    what = record["what"]
    if record.get("other_arguments") or record.get("other_adapter"):
        what += " otherwise"  # so that it takes the place of no check of the model as the card has it served
    path = record_file(home, record["engine"], what)
    with keeping_records(home):
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


def changes_vision(adapter: Path) -> bool:
    """Return whether an adapter's file has weights of the vision tower or the merger. Raises `UserError`."""
    from safetensors import SafetensorError, safe_open

    from qwen_vl_sft.families.base import ModelFamily

    try:
        with safe_open(adapter, framework="pt") as file:
            return any(f".{ModelFamily.tower}." in name for name in file.keys())  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--run: {adapter} cannot be read ({error}); name a finished run") from None


def stats(files: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and time of the files that are there."""
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files if path.is_file()]


def valid_records(folders: Sequence[Path], published: Path) -> Iterator[dict[str, Any]]:
    """Yield the records that tell of the weights in `published`, or of a merge of the adapter there, as it is now.

    A check with options of its own tells nothing of the model as the card has it served.
    """
    for record in read_records(folders):
        own = record.get("other_arguments") or record.get("other_adapter")
        weights, merged_from = record["weights"], record.get("run_weights")
        if not own and any(
            found and unchanged(found, published, record["finished"]) for found in (weights, merged_from)
        ):
            yield record


def unchanged(found: Sequence[Sequence[Any]], folder: Path, finished: float) -> bool:
    """Return whether the files that a record found (`stats`) are still those in a folder, which may be a copy."""
    for name, size, written in found:
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return False
        if int(file.stat().st_mtime) != written and file.stat().st_mtime > finished + COPY_TOLERANCE:
            return False
    return True
