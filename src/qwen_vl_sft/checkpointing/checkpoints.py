"""Checkpoints of a run: the mark of a complete one, and the choice of the one to resume from.

A checkpoint is many files, written by several processes. Only when all of them have finished does the first process
write `complete.json`, with the size and digest of every file. What has no such mark, or does not agree with it, was cut
off or damaged, and is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import PARTIAL, atomic_write
from qwen_vl_sft.errors import UserError

MARK = "complete.json"
LATEST = "latest"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STATE = "trainer_state.json"
# Of a larger file only the two ends are read: a 7B model's optimizer has tens of GiB.
_DIGEST_WHOLE = 256 * 2**20
_DIGEST_END = 16 * 2**20
# What another machine has written may be seen late.
_SECONDS_TO_SEE = 30.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from. `about` is what its mark says of the run; empty for one without a mark.

    `best` is the checkpoint of the best evaluation until then, None when there is none to load. `judged_alike`: the run
    that goes on evaluates the same rows by the same metric, so that what was the best until then still counts.
    """

    path: Path
    step: int
    about: dict[str, Any]
    best: Path | None = None
    judged_alike: bool = True

    @property
    def evaluation_due(self) -> bool:
        """Return whether an evaluation was due next, which the resumed run does first."""
        return bool(self.about.get("evaluation_due"))

    @property
    def so_far(self) -> dict[str, Any]:
        """Return the totals of the whole run up to then (`SavingTrainer.so_far`)."""
        return dict(self.about.get("so_far", {}))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder of this name holds a checkpoint."""
    return _NAME.match(name) is not None


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder, from its name."""
    match = _NAME.match(folder.name)
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run by step, complete or not."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint_name(path.name)), key=step_of)


def marked(run: Path) -> list[Path]:
    """Return the checkpoints that were written completely, by step, without checking for damage since."""
    return [folder for folder in folders(run) if (folder / MARK).is_file()]


def newest_marked(run: Path, last_step: int) -> Path | None:
    """Return the newest of `marked` up to a step."""
    found = [folder for folder in marked(run) if step_of(folder) <= last_step]
    return found[-1] if found else None


def check_parts(folder: Path, processes: int) -> None:
    """Raise `UserError` where not all that so many processes have written is to be seen: no run could go on from that."""
    missing, until = _lacks(folder, processes), time.monotonic() + _SECONDS_TO_SEE
    while missing and time.monotonic() < until:
        time.sleep(1)
        missing = _lacks(folder, processes)
    if missing:
        raise UserError(
            f"{folder}: every process has written its part of this checkpoint, but {missing}, so no run could go on from"
            f" it. output_dir must be on storage that all machines share. What is there is left, without its {MARK}"
        )


def write_mark(folder: Path, about: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, after `check_parts`. Raises `OSError`."""
    files = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in _files(folder).items()}
    atomic_write(folder / MARK, json.dumps({**about, "files": files}, indent=2))


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from; None when it is complete."""
    if not (folder / MARK).is_file():
        return f"it was not written to its end ({MARK} is missing)"
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        wanted, processes = dict(mark["files"]), int(mark["world"]["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARK} cannot be read"
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
    return _lacks(folder, processes)


def find(run: Path, resume: str | None, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to resume from: the newest complete one of `run` for `latest`, else the folder named.

    `latest` passes over what is not whole and tells so, and is None where nothing is left: a job that is queued again
    starts anew if the first run did not get far enough. Raises `UserError` for a folder named that is not whole.
    """
    if resume is None:
        return None
    if resume != LATEST:
        return _named(Path(resume), tell)
    for folder in reversed(folders(run)):
        problem = problem_of(folder)
        if problem is None:
            return _read(folder)
        tell(f"{folder} is passed over: {problem}")
    return None


def _named(folder: Path, tell: Callable[[str], None]) -> Checkpoint:
    problem = problem_of(folder)
    if problem is not None and not (folder / MARK).exists():
        # Of a run before the mark existed, or copied without it: the set of files can be checked, not what they hold.
        missing = _lacks(folder, processes=None)
        if missing is None:
            tell(f"{folder} has no {MARK}; its files are all there, but that they are whole cannot be told")
            return _read(folder)
        problem = f"{problem}; {missing}"
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: {folder} cannot be gone on from: {problem}. Name an older checkpoint, or {LATEST}"
            f" for the newest whole one of output_dir"
        )
    return _read(folder)


def _read(folder: Path) -> Checkpoint:
    mark = folder / MARK
    about = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
    about.pop("files", None)
    step = json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"]
    return Checkpoint(folder, step, about)


def _lacks(folder: Path, processes: int | None) -> str | None:
    """Return what a resume needs and is missing; `processes` of the run that wrote it, None if not known."""
    names = set(_files(folder))
    needed = {_STATE, "scheduler.pt"}
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
    return {name: path for name, path in found.items() if name not in (MARK, MARK + PARTIAL)}


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
