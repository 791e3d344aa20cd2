"""The manifest of a checkpoint, `complete.json`, which shows that the checkpoint is complete and undamaged.

A checkpoint is many files, written by several processes. Only when all of them have finished does the first process
write the manifest, with the size and digest of every file. A checkpoint without a manifest, or with other files, was cut
off or damaged, and no run resumes from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import PARTIAL, atomic_write
from qwen_vl_sft.errors import UserError

MANIFEST = "complete.json"
STATE = "trainer_state.json"
# Of a larger file only the two ends are read: a 7B model's optimizer has tens of GiB.
_DIGEST_WHOLE = 256 * 2**20
_DIGEST_END = 16 * 2**20
# Files from another machine may become visible late.
_SECONDS_TO_SEE = 30.0


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest, without its files; an empty dictionary if there is no manifest."""
    path = folder / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    manifest.pop("files", None)
    return manifest


def check_all_files_visible(folder: Path, processes: int) -> None:
    """Raise `UserError` unless the files of all processes are visible; wait for them first."""
    missing, until = missing_file(folder, processes), time.monotonic() + _SECONDS_TO_SEE
    while missing and time.monotonic() < until:
        time.sleep(1)
        missing = missing_file(folder, processes)
    if missing:
        raise UserError(
            f"{folder}: every process has written its part of this checkpoint, but {missing}, so no run can resume from"
            f" it. output_dir must be on storage that all machines share. The files stay, without {MANIFEST}"
        )


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write the manifest of a complete checkpoint: `entries` and the list of its files. Raises `OSError`."""
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in _files(folder).items()}
    atomic_write(folder / MANIFEST, json.dumps({**entries, "files": files}, indent=2))


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from; None when it is complete and undamaged."""
    if not (folder / MANIFEST).is_file():
        return f"it was not written to its end ({MANIFEST} is missing)"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wanted, processes = dict(manifest["files"]), int(manifest["world"]["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    try:
        for name, entry in wanted.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if _digest(path) != entry["sha256"]:
                return f"{name} is not what was written (its sha256 differs)"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return missing_file(folder, processes)


def missing_file(folder: Path, processes: int | None) -> str | None:
    """Return the problem if a file is missing that a resume needs but the libraries would silently skip; else None.

    `processes`: number of processes that wrote the checkpoint, None if not known.
    """
    names = set(_files(folder))
    needed = {STATE, "scheduler.pt"}
    if any(name.startswith("pytorch_model_fsdp_0/") for name in names):
        needed |= {"pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"}
    elif any(name.startswith("global_step") for name in names):
        needed |= {"latest"}
    else:
        needed |= {"optimizer.pt"}
        if not any(name.endswith(".safetensors") or name.startswith("pytorch_model") for name in names):
            return "it holds no weights"
    if processes == 1:
        needed |= {"rng_state.pth"}
    elif processes:
        needed |= {f"rng_state_{rank}.pth" for rank in range(processes)}
    elif not any(name.startswith("rng_state") for name in names):
        return "it holds no state of the random numbers"
    missing = sorted(needed - names)
    hint = " (save_only_model leaves out what a resume needs)" if "optimizer.pt" in missing else ""
    return f"it holds no {', '.join(missing)}{hint}" if missing else None


def _files(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name not in (MANIFEST, MANIFEST + PARTIAL)}


def _digest(path: Path) -> str:
    """Return the sha256 of a file; of the first and last 16 MiB when it is larger than 256 MiB."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _DIGEST_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(_DIGEST_END))
        file.seek(size - _DIGEST_END)
        digest.update(file.read())
        return digest.hexdigest()
