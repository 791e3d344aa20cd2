"""Write the checkpoints of a run, each completely or not at all, with a manifest, and delete the oldest."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.checkpointing import checkpoints, rotation
from qwen_vl_sft.checkpointing.manifest import MANIFEST, check_all_files_visible, write_manifest
from qwen_vl_sft.checkpointing.parts import CheckpointParts
from qwen_vl_sft.checkpointing.save_errors import explained_save


class CheckpointWriter:
    """Writes the checkpoints of one run; any trainer that can save its state into a folder can use it.

    Args:
        run: the run folder.
        signature: of the run, written into every manifest; `world` holds the number of processes.
        keep: checkpoints that stay, None for all.
        newest_own_step: step of the checkpoint that the run resumes from, 0 for none; later of the newest one written.
        rank: this process.
        processes: number of processes.
    """

    def __init__(
        self,
        run: Path,
        signature: Mapping[str, Any],
        keep: int | None,
        newest_own_step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.run = run
        self.signature = dict(signature)
        self.keep = keep
        self.newest_own_step = newest_own_step
        self.parts = CheckpointParts(rank, processes)
        self.longest_seconds: float | None = None  # of the saves so far

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint of this run."""
        return checkpoints.newest_complete(self.run, self.newest_own_step)

    def write(
        self,
        step: int,
        accelerator: Any,
        writes: bool,
        save: Callable[[], None],
        entries: Callable[[], dict[str, Any]],
        best: Callable[[], str | None],
        report: Callable[[str, int], None],
    ) -> None:
        """Write the checkpoint of a step, and delete those that are not kept. All processes must call at once.

        Args:
            step: the optimizer step that has ended.
            accelerator: waits for all processes.
            writes: whether this process writes the manifest; the first one does.
            save: writes this process's part into the checkpoint's folder.
            entries: returns further entries of the manifest; called on all processes once all have saved.
            best: gives the best checkpoint so far, which stays.
            report: called with what is being done, and a number that grows.

        Raises `UserError` when it cannot be written; a half-written one is removed.
        """
        began = time.perf_counter()
        report("saving a checkpoint", 0)
        folder = checkpoints.folder_of(self.run, step)
        others = self.parts.wait_for_others
        with explained_save("a checkpoint", folder, self.newest(), remove=True, wait_for_others=others):
            if writes and folder.exists():
                _clear(folder)
            accelerator.wait_for_everyone()
            # The Trainer looks whether the best checkpoint's folder exists in order to load it at the end. Under FSDP
            # with split checkpoints nothing has made the newest one's folder by then, or only some processes see it,
            # and the others wait for them for ever.
            folder.mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            with self.parts.writing():
                save()
            report("its checkpoint is written", 1)
            accelerator.wait_for_everyone()
            more = entries()
            if writes:
                check_all_files_visible(folder, self.signature["world"]["processes"])
                rotation.rename_abandoned(self.run, self.newest_own_step, folder, _tell)
                write_manifest(folder, {**self.signature, **more})
        self.newest_own_step = step
        if writes:
            rotation.rotate(self.run, self.keep, folder, best())
        report("its checkpoint is complete", 2)
        # Nobody leaves before the manifest is written.
        accelerator.wait_for_everyone()
        self.longest_seconds = max(time.perf_counter() - began, self.longest_seconds or 0.0)


def _clear(folder: Path) -> None:
    """Make room for a checkpoint: half of it, from a run that was killed, may have files of more processes."""
    if (folder / MANIFEST).is_file():
        _tell(f"{folder}, which an earlier attempt had saved, is kept as {rotation.rename_out_of_the_way(folder).name}")
    else:
        shutil.rmtree(folder)


def _tell(message: str) -> None:
    print(f"checkpoints: {message}", file=sys.stderr, flush=True)
