"""Checkpoints of a run: their folders, and the choice of the one to resume from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.checkpointing.manifest import MANIFEST, STATE, missing_file, problem_of, read_manifest
from qwen_vl_sft.errors import UserError

LATEST = "latest"
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from. `manifest` holds the entries of its manifest; it is empty if there is none.

    `best` is the checkpoint of the best evaluation so far, None when there is none to load. `same_metric_and_eval_rows`:
    the resumed run evaluates the same rows by the same metric, so earlier scores still count.
    """

    path: Path
    step: int
    manifest: dict[str, Any]
    best: Path | None = None
    same_metric_and_eval_rows: bool = True

    @property
    def evaluation_due(self) -> bool:
        """Return whether an evaluation was postponed, which the resumed run must do first."""
        return bool(self.manifest.get("evaluation_due"))

    @property
    def totals(self) -> dict[str, Any]:
        """Return the totals of the run up to this checkpoint (`VisionSFTTrainer.totals`)."""
        return dict(self.manifest.get("so_far", {}))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a folder of this name holds a checkpoint."""
    return _NAME.match(name) is not None


def folder_of(run: Path, step: int) -> Path:
    """Return where a run keeps the checkpoint of a step."""
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder, by its name."""
    match = _NAME.match(folder.name)
    assert match, f"{folder} is no checkpoint"
    return int(match[1])


def folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not, by their steps."""
    return sorted((path for path in run.glob("checkpoint-*") if is_checkpoint_name(path.name)), key=step_of)


def with_manifest(run: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, by their steps; their files are not checked for damage."""
    return [folder for folder in folders(run) if (folder / MANIFEST).is_file()]


def newest_complete(run: Path, last_step: int) -> Path | None:
    """Return the newest of `with_manifest` up to a step."""
    found = [folder for folder in with_manifest(run) if step_of(folder) <= last_step]
    return found[-1] if found else None


def find(run: Path, resume: str | None, tell: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to resume from: the newest complete one of `run` for `latest`, else the folder named.

    With `latest`, incomplete checkpoints are skipped and reported to `tell`; the result is None if none is left, so that a
    requeued job can start from the beginning. Raises `UserError` if a folder that was named is not complete.
    """
    if resume is None:
        return None
    if resume != LATEST:
        return _named(Path(resume), tell)
    for folder in reversed(folders(run)):
        problem = problem_of(folder)
        if problem is None:
            return _read(folder)
        tell(f"skipped {folder}: {problem}")
    return None


def _named(folder: Path, tell: Callable[[str], None]) -> Checkpoint:
    problem = problem_of(folder)
    if problem is not None and not (folder / MANIFEST).exists():
        # Written before there were manifests, or copied without it: the names of the files can be checked, not their content.
        missing = missing_file(folder, processes=None)
        if missing is None:
            tell(f"{folder} has no {MANIFEST}; its files are all there, but cannot be checked for damage")
            return _read(folder)
        problem = f"{problem}; {missing}"
    if problem is not None:
        raise UserError(
            f"resume_from_checkpoint: cannot resume from {folder}: {problem}. Name an older checkpoint, or {LATEST} for"
            f" the newest complete one of output_dir"
        )
    return _read(folder)


def _read(folder: Path) -> Checkpoint:
    step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
    return Checkpoint(folder, step, read_manifest(folder))
