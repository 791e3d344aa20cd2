"""Git LFS: a clone without it has small texts that point to the files, in their places."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"
WAY_OUT = "fetch the files with git lfs pull"


def is_pointer(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a pointer."""
    return head.startswith(_BEGINNING)


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise `ValueError` that names the first of these files that is a pointer."""
    for path in files:
        with path.open("rb") as file:
            if is_pointer(file.read(len(_BEGINNING))):
                raise ValueError(f"{path.name} is a Git LFS pointer, not the file itself; {WAY_OUT}")
