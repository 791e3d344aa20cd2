"""Claim a folder for one run: of two that start at once, only one may write to it.

A claim is a file `.claim-N.json` that names its owner: host, process and time. The owner renews the file's time while it
runs, and deletes the file when it ends. The claim of an owner that has died is taken over by making the file with the next
number, which only one process can make, also on storage that machines share.

A process number says nothing on another host, nor in another container. There a claim counts as dead when it is not
renewed for `SILENT_SECONDS`, or at once when it is of an earlier start of this Slurm job, which Slurm has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_sft.errors import UserError, leave

if TYPE_CHECKING:
    # It imports PyTorch; a name of a claim is read without it.
    from qwen_vl_sft.distributed.context import DistributedContext

BEAT_SECONDS = 15.0
SILENT_SECONDS = 90.0
_NAME = re.compile(r"\.claim-(\d+)\.json")


def is_claim(path: Path) -> bool:
    """Return whether a file in a folder is a claim of it."""
    return _NAME.fullmatch(path.name) is not None


class FolderClaim:
    """The claim of a folder by this process, as a context manager; `path` is None on a process that claims nothing.

    Args:
        path: the file of the claim.
        content: what it holds.
        made: folders that were made for it, which are removed again if nothing else is in them.
    """

    def __init__(self, path: Path | None, content: bytes = b"", made: tuple[Path, ...] = ()) -> None:
        self.path, self.content, self.made = path, content, made
        self._process = os.getpid()
        self._released = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        if path is not None:
            self._keeper.start()

    def __enter__(self) -> FolderClaim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free. Does nothing the second time, and in a process forked from the owner."""
        if self.path is None or self._released.is_set() or os.getpid() != self._process:
            return
        self._released.set()
        self._keeper.join(timeout=1.0)
        with contextlib.suppress(OSError):
            self.path.unlink()
        remove_empty(self.made)

    def _keep(self) -> None:
        """Renew the claim until it is released; end the process if another run has taken it over meanwhile."""
        path = self.path
        assert path is not None
        while not self._released.wait(BEAT_SECONDS):
            try:
                newest = _newest(path.parent)
                if newest is not None and newest != path and _read(newest) not in (None, self.content):
                    leave(
                        1,
                        f"error: {path.parent} was taken over by {describe(_owner(_read(newest)))} while this process stood"
                        f" still; it ends without writing more",
                    )
                if newest is not None:
                    os.utime(path)
            except OSError:  # storage that is away for a while
                continue


def claim_folder(folder: Path, key: str) -> FolderClaim:
    """Claim a folder, which is made if needed. Raises `UserError` while another run holds it, or if it cannot be written.

    `key` is the setting that names the folder. A claim on another host, of which nothing is known, is watched first.
    """
    made: list[Path] = []
    try:
        while True:
            made += [path for path in missing_folders(folder) if path not in made]
            folder.mkdir(parents=True, exist_ok=True)
            claim = _try(folder, key, tuple(made))
            if claim is not None:
                return claim
            time.sleep(random.uniform(0.05, 0.5))
    except OSError as error:
        remove_empty(made)
        why = error.strerror or str(error)
        raise UserError(f"{key}: {folder} cannot be written: {why}; name another folder") from None
    except BaseException:
        remove_empty(made)
        raise


def claim_for_all(
    folder: Path, key: str, context: DistributedContext, check: Callable[[], None] | None = None
) -> FolderClaim:
    """Claim a folder for all processes of a run. Raises `UserError` on all of them. All must call at once, joined.

    `check` is called by the first process once the folder is claimed: what another run has written since the folder was
    looked at is seen then.
    """
    from qwen_vl_sft.distributed.launch import from_first

    claim = FolderClaim(None)
    problems: tuple[str, ...] = ()
    if context.rank == 0:
        try:
            claim = claim_folder(folder, key)
            if check is not None:
                check()
        except UserError as error:
            claim.release()
            problems = error.problems
    problems = from_first(context, problems)
    if problems:
        raise UserError(*problems)
    return claim


def missing_folders(folder: Path) -> list[Path]:
    """Return the folders that must be made for `folder` to exist, itself first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path] | tuple[Path, ...]) -> None:
    """Remove folders, those inside first, but not what holds something."""
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def describe(owner: Mapping[str, Any]) -> str:
    """Describe the owner of a claim: process, host, Slurm job and time."""
    if "process" not in owner:
        return "a process that its claim does not name"
    job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return f"process {owner['process']} on {owner.get('host')}{job}, since {owner.get('since')}"


def _try(folder: Path, key: str, made: tuple[Path, ...]) -> FolderClaim | None:
    """Claim a folder that nobody holds, or whose owner is dead; None where that has to be tried again."""
    before = _newest(folder)
    dead = None
    if before is not None:
        dead = _read(before)
        state = _state_of(before, dead)
        if state == "changed":
            return None
        if state == "alive":
            raise UserError(
                f"{key}: {folder} is being written to by another run ({describe(_owner(dead))}); wait for its end, or name"
                f" another folder"
            )
    path = folder / f".claim-{_number(before) + 1 if before else 1}.json"
    content = json.dumps({**_here(), "id": uuid.uuid4().hex}).encode()
    try:
        with path.open("xb") as file:
            file.write(content)
    except (FileExistsError, FileNotFoundError):  # another run was faster, or removed the folder that it had made
        return None
    unseen = [other for other in _claims(folder) if other != path and _read(other) not in (None, dead)]
    if unseen:
        path.unlink()
        return None
    if before is not None:
        for other in _claims(folder):
            if other != path:
                other.unlink(missing_ok=True)
        _tell(f"{key}: {folder} was claimed by {describe(_owner(dead))}, which has ended; this run takes it over")
    return FolderClaim(path, content, made)


def _state_of(path: Path, content: bytes | None) -> Literal["alive", "dead", "changed"]:
    """Return whether the owner of a claim lives; "changed" when the claim is no longer what was read."""
    if content is None:
        return "changed"
    owner, here = _owner(content), _here()
    if owner and all(owner.get(name) == here[name] for name in ("host", "boot", "process_space")):
        return "alive" if owner.get("started") == _started(owner.get("process")) else "dead"
    job = owner.get("slurm_job")
    if job and job == here["slurm_job"] and owner.get("slurm_restart", 0) < here["slurm_restart"]:
        return "dead"
    _tell(
        f"{path.parent} is claimed by {describe(owner)}; waiting up to {SILENT_SECONDS:.0f} s for a sign that it still runs"
    )
    renewed, until = _time_of(path), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_SECONDS))
        if _read(path) != content:
            return "changed"
        if _time_of(path) != renewed:
            return "alive"
    return "dead"


def _here() -> dict[str, Any]:
    """Return what tells this process from any other one."""
    return {
        "host": platform.node(),
        # Containers of one name differ in these; a machine that was started again differs in the first.
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "process_space": _link("/proc/self/ns/pid"),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _started(process: Any) -> str | None:
    """Return when a process of this host started, None if there is none: its number may belong to another one by now."""
    if not isinstance(process, int):
        return None
    stat = _text(f"/proc/{process}/stat")
    if stat is not None:
        # After the name, which may hold anything, the third field is the state and the 22nd the start in clock ticks.
        words = stat.rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]
    import psutil

    try:
        return f"{psutil.Process(process).create_time():.0f}"
    except psutil.Error:
        return None


def _claims(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if is_claim(path))


def _newest(folder: Path) -> Path | None:
    return max(_claims(folder), key=_number, default=None)


def _number(claim: Path) -> int:
    match = _NAME.fullmatch(claim.name)
    assert match
    return int(match[1])


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _time_of(path: Path) -> int | None:
    try:
        # Opened anew, since a client of NFS keeps the times of a file for a while.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _owner(content: bytes | None) -> dict[str, Any]:
    try:
        owner = json.loads(content or b"")
    except ValueError:  # made a moment ago, or by a process that was killed then
        return {}
    return owner if isinstance(owner, dict) else {}


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
