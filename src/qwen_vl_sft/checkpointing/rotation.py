"""Rotate checkpoints: keep the newest and the best, and set aside those that a run has abandoned."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from qwen_vl_sft.checkpointing.checkpoints import folders, step_of, with_manifest
from qwen_vl_sft.checkpointing.manifest import MANIFEST

_ABANDONED = "abandoned-"


def rotate(run: Path, keep: int | None, newest: Path, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints, and incomplete ones. `newest` and the best always stay.

    Call it when `newest`, just written, has its manifest: at every moment the run has a complete checkpoint then.
    """
    if keep is None or keep < 1:
        return
    whole = with_manifest(run)
    protected = {newest.name} | ({Path(best).name} if best else set())
    spare = [folder for folder in whole if folder.name not in protected]
    surplus = len(whole) - max(keep, len(protected))
    for folder in spare[: max(surplus, 0)]:
        delete(folder)
    for folder in folders(run):
        if folder not in whole and folder.name not in protected:
            shutil.rmtree(folder, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves nothing that looks complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rename_abandoned(run: Path, after: int, new: Path, tell: Callable[[str], None]) -> None:
    """Rename checkpoints later than step `after`, from which the run was restarted, and report it to `tell`.

    Otherwise `latest` would find them, since their steps are higher than that of `new`, which stays. Call it when `new` is
    written but has no manifest yet: a run that is killed in between still has the checkpoint that it resumed from. Raises
    `OSError`.
    """
    left = [folder for folder in with_manifest(run) if step_of(folder) > after and folder != new]
    names = [rename_out_of_the_way(folder).name for folder in left]
    if names:
        tell(
            f"{run} resumed from {f'step {after}' if after else 'the start'}; what an earlier attempt had saved after it"
            f" is kept as {', '.join(names)}, where latest does not look. Delete what you do not need"
        )


def rename_out_of_the_way(folder: Path) -> Path:
    """Rename a checkpoint so that the run no longer finds it; return its new path."""
    name = f"{_ABANDONED}{folder.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))
