"""Whether all processes see one run folder: each writes its part of a checkpoint there, and the first one marks it."""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.launching import launch
from qwen_vl_sft.launching.world import World

# What one machine writes may reach another's view of the storage late.
_SECONDS_TO_SEE = 10.0


def check_shared(folder: Path, world: World) -> None:
    """Raise `UserError` on all processes when one of them does not see what the first writes to `folder`.

    Call it on all processes when they are joined, before the folder is written to; nothing stays in it.
    """
    if world.processes == 1:
        return
    with contextlib.ExitStack() as stack:
        name, failure = "", None
        if world.rank == 0:
            try:
                name = stack.enter_context(_written(folder))
            except OSError as error:
                failure = error.strerror
        name, failure = launch.from_first(world, (name, failure))
        if failure:
            raise UserError(f"output_dir: {folder} cannot be written: {failure}; name another folder")
        answers: list[Any] = [None] * world.processes
        dist.all_gather_object(answers, (platform.node(), _sees(folder / name)))
    blind = {rank: machine for rank, (machine, sees) in enumerate(answers) if not sees}
    if blind:
        machines = ", ".join(sorted(set(blind.values())))
        raise UserError(
            f"output_dir: what process 0 on {answers[0][0]} writes to {folder} is not seen by process(es)"
            f" {', '.join(map(str, blind))} on {machines}, so no checkpoint would be whole; name a folder on storage that"
            f" all machines share, by the same path"
        )


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[str]:
    """The name of a file in `folder`, which is made if need be; nothing is left afterwards."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".seen-by-all-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        yield probe.name
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _sees(path: Path) -> bool:
    until = time.monotonic() + _SECONDS_TO_SEE
    while not path.is_file():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
