"""Write files atomically, and report places that cannot be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from qwen_vl_sft.errors import UserError

PARTIAL = ".partial"


def atomic_write(path: Path, text: str) -> None:
    """Write a file atomically: no reader meets half of it, and no killed run leaves half of it. Raises `OSError`.

    A lone surrogate, which texts out of JSON may carry, has no UTF-8 form; it is written as JSON writes it.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing_to(output: Path, way_out: str = "free space, or name another folder") -> Iterator[None]:
    """Turn a full or forbidden disk into a `UserError` about `--output_dir`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"--output_dir: {output} cannot be written: {reason}; {way_out}") from error
