"""Turn a failed save, such as on a full disk, into an error that names the last good checkpoint and the way out."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from qwen_vl_sft.errors import UserError


@contextlib.contextmanager
def explained_save(
    what: str, folder: Path, kept: Path | None, remove: bool, wait_for_others: Callable[[], None] | None = None
) -> Iterator[None]:
    """Turn a failure to write inside into a `UserError`; with `remove`, the half-written folder is removed.

    `wait_for_others` returns once no other process writes into the folder: its files would make it anew.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = _write_failure(error, folder)
        if reason is None:
            raise
        if remove:
            if wait_for_others:
                wait_for_others()
            shutil.rmtree(folder, ignore_errors=True)
        last = f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet"
        raise UserError(
            f"{what} could not be written to {folder}: {reason}. {last}; fix this, then resume with"
            f" --resume_from_checkpoint latest"
        ) from error


def _write_failure(error: BaseException, folder: Path) -> str | None:
    """Return why a file could not be written, by any process where the error tells of all; None for another error."""
    if isinstance(error, CheckpointException):
        reasons = [_write_failure(failure, folder) for failure, _ in error.failures.values()]
        return next(filter(None, reasons), None)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    # safetensors and torch.save have errors of their own for a failed write.
    if "os error" in text:
        return text.splitlines()[0]
    if "PytorchStreamWriter" in text or "inline_container" in text:
        full = _is_full(folder)
        return "No space left on device" if full else text.splitlines()[0]
    return None


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder.parent).free < 2**20
    except OSError as error:
        return error.errno == errno.ENOSPC
