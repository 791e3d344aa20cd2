"""Remove what processes that were killed have left in /dev/shm: it takes memory until the node restarts."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from qwen_vl_sft.diagnosis.machine import SHARED_MEMORY

# Names that PyTorch, NCCL and Python's multiprocessing give.
_OURS = re.compile(r"torch_\d+_\d+_\d+|nccl-\w{6,}|psm_\w{8,}|sem\.mp-\w{6,}|sem\.loky-\d+-\w+")
_OLD_SECONDS = 600.0
# The namespace of the machine itself: in another one, owners of a file may be processes that are not seen.
_WHOLE_MACHINE = "pid:[4026531836]"


def remove_leftovers(folder: Path = SHARED_MEMORY, processes: Path = Path("/proc")) -> tuple[int, int]:
    """Remove files of this user that PyTorch, NCCL or multiprocessing made and no process uses; return files and bytes.

    A file stays when it is younger than ten minutes, when a process of this user has it open or mapped, and when this
    cannot be told: inside a container that sees its own processes alone, or where a Python process cannot be looked into.
    """
    if _namespace(processes) != _WHOLE_MACHINE:
        return 0, 0
    # Listed before the processes are looked at: whoever takes a file afterwards has made it anew.
    old = {path: size for path, size in _old_files(folder) if not _maker_lives(path.name, processes)}
    used = _used_files(processes, folder) if old else set()
    if used is None:
        return 0, 0
    removed = [size for path, size in old.items() if path not in used and _remove(path)]
    return len(removed), sum(removed)


def _namespace(processes: Path) -> str:
    try:
        return os.readlink(processes / "self/ns/pid")
    except OSError:
        return ""


def _old_files(folder: Path) -> Iterator[tuple[Path, int]]:
    now = time.time()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _status(path)
            if found is None or not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                continue
            young = now - _changed(found) < _OLD_SECONDS
            if not young and _OURS.fullmatch(path.name):
                yield path, found.st_blocks * 512


def _changed(found: os.stat_result) -> float:
    """Return when a file was last written to, renamed or given to somebody else."""
    return max(found.st_mtime, found.st_ctime)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _maker_lives(name: str, processes: Path) -> bool:
    """Return whether the process lives that a name of PyTorch's holds; another user's may have its number by now."""
    maker = re.match(r"torch_(\d+)_", name)
    return maker is not None and (processes / maker[1]).exists()


def _used_files(processes: Path, folder: Path) -> set[Path] | None:
    """Return the files of a folder that processes of this user have open or mapped; None where that cannot be told."""
    used: set[Path] = set()
    for process in processes.glob("[0-9]*"):
        try:
            if _owner(process / "status") == os.getuid():
                used |= _files_of(process, folder)
        except PermissionError:
            # It hides from others, as an agent with keys does. One that computes must be looked into.
            if _command(process).startswith(("python", "pt_", "ray")):
                return None
        except OSError:  # it has ended
            continue
    return used


def _files_of(process: Path, folder: Path) -> set[Path]:
    """Return the files of a folder that a process has mapped or open. Raises `OSError`."""
    lines = (process / "maps").read_text(errors="replace").splitlines()
    names = [line.split(maxsplit=5)[-1] for line in lines]
    names += [os.readlink(entry) for entry in (process / "fd").iterdir()]
    return {Path(name.removesuffix(" (deleted)")) for name in names if name.startswith(f"{folder}/")}


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def _owner(status: Path) -> int:
    """Return the user of a process; files in /proc of one that hides belong to root."""
    for line in status.read_text().splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[1])
    return -1


def _remove(path: Path) -> bool:
    try:
        path.unlink()
        return True
    except OSError:
        return False
