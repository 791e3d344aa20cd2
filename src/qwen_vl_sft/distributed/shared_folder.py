"""Check that all processes see one run folder: each writes its part of a checkpoint there."""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.distributed.folder_claim import missing_folders, remove_empty
from qwen_vl_sft.errors import UserError

# What one machine writes may reach another's view of the storage late: NFS looks anew after 60 s at the latest.
_SECONDS_TO_SEE = 65.0


def check_shared(folder: Path, context: DistributedContext) -> None:
    """Raise `UserError` on all processes when the first cannot write to `folder`, or one does not see what it writes.

    Call it on all processes when they are joined, before the folder is written to; nothing stays in it.
    """
    with contextlib.ExitStack() as stack:
        name, failure = "", None
        if context.rank == 0:
            try:
                name = stack.enter_context(written(folder))
            except OSError as error:
                failure = error.strerror or str(error)
        name, failure = launch.from_first(context, (name, failure))
        if failure:
            raise UserError(f"output_dir: {folder} cannot be written: {failure}; name another folder")
        if context.processes == 1:
            return
        answers: list[Any] = [None] * context.processes
        dist.all_gather_object(answers, (platform.node(), sees(folder / name)))
    blind = {rank: machine for rank, (machine, sees) in enumerate(answers) if not sees}
    if blind:
        machines = ", ".join(sorted(set(blind.values())))
        raise UserError(
            f"output_dir: what process 0 on {answers[0][0]} writes to {folder} is not seen by process(es)"
            f" {', '.join(map(str, blind))} on {machines}, so no checkpoint would be whole; name a folder on storage that"
            f" all machines share, by the same path"
        )


@contextlib.contextmanager
def written(folder: Path) -> Iterator[str]:
    """Yield the name of a new file in `folder`, which is created if needed; leave nothing afterwards. Raises `OSError`."""
    made = missing_folders(folder)
    probe = folder / f".seen-by-all-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        yield probe.name
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
        remove_empty(made)


def sees(path: Path, seconds: float | None = None) -> bool:
    """Return whether this process sees a file, within some seconds: those that NFS takes at most, unless given."""
    made, until = missing_folders(path.parent), time.monotonic() + (_SECONDS_TO_SEE if seconds is None else seconds)
    # NFS remembers that a folder was missing, and passes on a wish to make it all the same.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    while not path.is_file():
        if time.monotonic() > until:
            remove_empty(made)
            return False
        time.sleep(0.1)
    return True
