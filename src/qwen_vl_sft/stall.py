"""The end of a run whose processes wait for each other for ever, told with what each of them was doing.

A collective that one process never joins would otherwise end in the communication library's own timeout, which names a
tensor and no cause, or on a CPU never.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore

from qwen_vl_sft.errors import leave

# This report comes before the communication library's own timeout.
_SHARE_OF_TIMEOUT = 0.9
_SECONDS_TO_CONNECT = 10


class StallWatch(threading.Thread):
    """Ends this process, with exit code 1, when it has not moved for most of `ddp_timeout`.

    The first process to notice writes what all of them were doing to the standard error; each leaves the stacks of its
    threads in `stalled-rank-N.txt` of the run folder.

    Args:
        folder: the run folder.
        rank: this process.
        processes: number of processes.
        timeout: `ddp_timeout`, seconds.
    """

    def __init__(self, folder: Path, rank: int, processes: int, timeout: float) -> None:
        super().__init__(name="stall-watch", daemon=True)
        self.folder, self.rank, self.processes = folder, rank, processes
        self.limit = timeout * _SHARE_OF_TIMEOUT
        self._moved = ("starting", time.monotonic())
        self._ended = threading.Event()

    def move(self, doing: str) -> None:
        """This process goes on to something else."""
        self._moved = (doing, time.monotonic())

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def run(self) -> None:
        """Look once in a while, until the end or a stall."""
        while not self._ended.wait(min(5.0, self.limit / 10)):
            doing, since = self._moved
            if time.monotonic() - since > self.limit:
                self._report(doing, since)

    def _report(self, doing: str, since: float) -> None:
        try:
            with (self.folder / f"stalled-rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                file.write(f"{doing}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            store = _own_store()
            store.set(str(self.rank), f"{doing}, for {time.monotonic() - since:,.0f} s")
            if store.add("reporters", 1) == 1:
                message = format_report(self._collect(store), self.limit, self.folder)
                store.set("told", "yes")
                leave(1, message)
            store.wait(["told"], timedelta(seconds=2 * self._patience()))
        finally:
            os._exit(1)

    def _patience(self) -> float:
        """Seconds to wait for the other processes, which do not fall silent at the same moment."""
        return max(10.0, self.limit / 5)

    def _collect(self, store: PrefixStore) -> list[str | None]:
        until = time.monotonic() + self._patience()
        while time.monotonic() < until and not store.check([str(rank) for rank in range(self.processes)]):
            time.sleep(0.2)
        ranks = [str(rank) for rank in range(self.processes)]
        return [store.get(rank).decode() if store.check([rank]) else None for rank in ranks]


def format_report(doing: Sequence[str | None], seconds: float, folder: Path) -> str:
    """What every process was doing; None for one that says nothing, since it still moves or has gone."""
    lines = [f"error: the processes have waited for each other for {seconds:,.0f} s, most of ddp_timeout"]
    lines += [f"  process {rank}: {found or 'still moving, or gone'}" for rank, found in enumerate(doing)]
    lines.append(
        f"The one that stands elsewhere than the others holds them up; {folder}/stalled-rank-N.txt shows where in the code."
        " If it was only slow, raise ddp_timeout. Go on with --resume_from_checkpoint latest"
    )
    return "\n".join(lines)


def _own_store() -> PrefixStore:
    """A connection of our own: that of the process group may be waiting in another thread."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_CONNECT))
    return PrefixStore("qwen_vl_sft/stall", store)
