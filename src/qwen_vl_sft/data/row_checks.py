"""Checking rows: each is read and measured once, on all cores, and what is found is kept on disk.

What was found holds as long as the rows, the encoder and the image files that rows name stay as they are; of files that
have changed, by size or time, the rows alone are checked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset
from tqdm import tqdm

from qwen_vl_sft import __version__
from qwen_vl_sft.atomic_write import PARTIAL
from qwen_vl_sft.compat.for_python import settle_before_forks
from qwen_vl_sft.cpu_cores import usable_cores
from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media import LookAt, archives, looking_once, path_of
from qwen_vl_sft.errors import BadRow, OverLongRow, UserError

COUNTS = ("tokens", "target_tokens", "images", "patches", "prefix_tokens", "prefix_patches")
_SCHEMA = pa.schema(
    {
        "problem": pa.large_string(),
        "overlong": pa.bool_(),
        **dict.fromkeys((ROW_ID, *COUNTS), pa.int64()),
        "prefix": pa.large_string(),
        "opening": pa.large_string(),
        "opening_tokens": pa.int64(),
        "files": pa.large_list(pa.large_string()),
        "content_hashes": pa.large_list(pa.large_string()),
        "image_patches": pa.large_list(pa.int64()),
        "image_sides": pa.large_list(pa.int64()),
        "question": pa.large_string(),
        "answer": pa.large_string(),
        "answer_tokens": pa.int64(),
    }
)
# A row that cannot be used has none of these.
_NOTHING: dict[str, Any] = {
    **dict.fromkeys((*COUNTS, "opening_tokens", "answer_tokens"), 0),
    **dict.fromkeys(("prefix", "opening", "question", "answer"), ""),
    **{name: [] for name in ("content_hashes", "image_patches", "image_sides")},
}
# Raise it when reading, refusing or measuring of rows changes: what was found before is then ignored.
_VERSION = 9
# Rows that a process checks at a time, and rows that are worth a process.
_PIECE, _WORTH_A_PROCESS = 32, 256
# Files on a network answer slowly, but many at a time.
_THREADS, _FILES_OF_A_THREAD = 16, 256


@dataclass(frozen=True)
class Checks:
    """What is looked at in each row: `decode` proves pixels readable, `content_hashes` tells images and texts apart."""

    encoder: Encoder
    decode: bool
    content_hashes: bool


def check_rows(rows: Rows, checks: Checks, processes: int | None = None) -> pa.Table:
    """Return what is found in each row, in their order; `processes` work on it, all cores for None.

    The table has the column `row_id` and those of `RowLength`, which are zero and empty in a row that cannot be used; its
    `problem`, else null, and whether it is that it is `overlong`. What was found with `content_hashes` serves without too.
    """
    path = _place(rows, checks)
    known = _read(path)
    if known is None and not checks.content_hashes:
        fuller = replace(checks, content_hashes=True)
        if (more := _read(_place(rows, fuller))) is not None:
            path, known, checks = _place(rows, fuller), more, fuller
    places = np.arange(len(rows)) if known is None else _outdated(known, rows)
    if not len(places):
        assert known is not None
        return known
    found = _check(rows, places, checks, processes)
    if known is not None:
        order = np.arange(len(known))
        order[places] = len(known) + np.arange(len(places))
        found = pa.concat_tables([known, found]).take(order)
    _write(path, found)
    return found


def _place(rows: Rows, checks: Checks) -> Path:
    """Return where findings are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "qwen_vl_sft_scans" / f"{_fingerprint(rows, checks)}.arrow"


def _check(rows: Rows, places: np.ndarray, checks: Checks, processes: int | None) -> pa.Table:
    workers = min(processes, len(places)) if processes else min(usable_cores(), len(places) // _WORTH_A_PROCESS)
    pieces = _Pieces(rows, places, checks)
    found = []
    hidden = datasets.utils.are_progress_bars_disabled()
    # In a file each state of the bar is a line.
    every = 0.5 if sys.stderr.isatty() else 15
    try:
        with tqdm(
            total=len(places), desc=f"Checking {rows.title}", unit=" rows", disable=hidden, mininterval=every
        ) as bar:
            for piece in _loaded(pieces, workers) if workers > 1 else map(pieces.__getitem__, range(len(pieces))):
                if isinstance(piece, UserError):
                    raise piece
                found.append(piece)
                bar.update(len(piece))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{rows.name}: a process that checks the rows has ended, most likely because memory ran out; set"
            f" dataset_num_proc to less than {workers}"
        ) from error
    return pa.Table.from_batches(found, _SCHEMA)


def _loaded(pieces: _Pieces, workers: int) -> DataLoader[Any]:
    settle_before_forks()
    # A separate generator, so that training's random numbers do not change.
    return DataLoader(pieces, batch_size=None, num_workers=workers, generator=torch.Generator())


class _Pieces(MapDataset[Any]):
    """Findings of a few rows each, made in the workers of a data loader."""

    def __init__(self, rows: Rows, places: np.ndarray, checks: Checks) -> None:
        self.rows = rows
        self.places = places
        self.checks = checks

    @cached_property
    def look(self) -> LookAt:
        """Return what looks at images; each worker remembers those that it has seen."""
        checks = self.checks
        return looking_once(partial(checks.encoder.look_at, decode=checks.decode, identify=checks.content_hashes))

    def __len__(self) -> int:
        return -(-len(self.places) // _PIECE)

    def __getitem__(self, number: int) -> pa.RecordBatch | UserError:
        places = self.places[number * _PIECE : (number + 1) * _PIECE]
        try:
            found = [_check_row(self.rows, int(place), self.checks, self.look) for place in places]
        except UserError as error:  # a loader would wrap it into a traceback
            return error
        return pa.RecordBatch.from_pylist(found, _SCHEMA)


def _check_row(rows: Rows, place: int, checks: Checks, look: LookAt) -> dict[str, Any]:
    assert isinstance(rows.dataset, Dataset)
    raw: Mapping[str, Any] = rows.dataset[place]
    found: dict[str, Any] = {**_NOTHING, "problem": None, "overlong": False, ROW_ID: raw[ROW_ID], "files": []}
    try:
        conversation = rows.format.read(raw, rows.folder)
        # Before they are read: one that changes meanwhile is then checked again.
        found["files"] = [_stamp(path) for file in conversation.media if (path := path_of(file))]
        found |= asdict(checks.encoder.measure(conversation, look, checks.content_hashes))
        checks.encoder.check_length(found["tokens"])
        return found
    except BadRow as error:
        return found | {"problem": str(error), "overlong": isinstance(error, OverLongRow)}


def _stamp(path: str) -> str:
    """Return a file's path, size and time as text, null for one that is not there."""
    try:
        try:
            found = os.stat(path)
        except NotADirectoryError:
            found = os.stat(archives.file_on_disk(Path(path)))
    except (OSError, ValueError):
        return json.dumps([path, None])
    return json.dumps([path, found.st_size, found.st_mtime_ns])


def _outdated(known: pa.Table, rows: Rows) -> np.ndarray:
    """Return the places of rows that must be checked again."""
    files = known["files"].combine_chunks()
    stamps = files.flatten()
    different = stamps.unique().to_pylist()
    parts = [different[start : start + _FILES_OF_A_THREAD] for start in range(0, len(different), _FILES_OF_A_THREAD)]
    with ThreadPoolExecutor(_THREADS) as threads:
        changed = [stamp for part in threads.map(partial(_changed, folder=rows.folder), parts) for stamp in part]
    is_outdated = np.zeros(len(known), dtype=bool)
    if changed:
        told = pc.is_in(stamps, value_set=pa.array(changed, pa.large_string()))
        is_outdated[pc.list_parent_indices(files).filter(told).to_numpy()] = True
    if not _holds_images(rows):
        # What is wrong with a row that names no file, as far as it was read, may be where a link leads.
        unnamed = pc.equal(pc.list_value_length(files), 0).to_numpy(zero_copy_only=False)
        is_outdated |= unnamed & known["problem"].is_valid().to_numpy() & ~known["overlong"].to_numpy()
    return is_outdated.nonzero()[0]


def _changed(stamps: list[str], folder: Path | None) -> list[str]:
    return [stamp for stamp in stamps if _is_changed(stamp, folder)]


def _is_changed(stamp: str, folder: Path | None) -> bool:
    path, *state = json.loads(stamp)
    if _stamp(path) != stamp:
        return True
    if state != [None] or folder is None:
        return False
    try:
        # A file that was not there may be in an archive since.
        return bool(archives.find(Path(path), folder.absolute()))
    except (OSError, ValueError):
        return True


def _holds_images(rows: Rows) -> bool:
    """Return whether images are in the rows themselves, not in files that they name."""
    features = rows.dataset.features or {}
    return any("bytes" in str(feature) or "Image" in str(feature) for feature in features.values())


def _read(path: Path) -> pa.Table | None:
    """Read what was found before, mapped into memory; None where there is nothing, or nothing whole."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid):
        return None


def _write(path: Path, found: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(found)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fingerprint(rows: Rows, checks: Checks) -> str:
    """Digest everything that findings depend on but the files that rows name."""
    encoder, processor = checks.encoder, checks.encoder.processor
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
        "verify_images": checks.decode,
        "content_hashes": checks.content_hashes,
        "chat_template": processor.chat_template,
        "template_options": encoder.template_options,
        "image_processor": str(processor.image_processor.to_dict()),
        "tokenizer": hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "version": __version__,
        "scan": _VERSION,
        "columns": sorted(_SCHEMA.names),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
