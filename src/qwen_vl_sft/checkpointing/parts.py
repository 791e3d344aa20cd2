"""Tell which processes still write their part of a checkpoint, so that none removes the folder while another writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from torch.distributed import PrefixStore

from qwen_vl_sft.distributed.store import connect

# Another one may wait in a collective of the save for this process, which has left it.
_SECONDS_FOR_OTHERS = 10.0
_LOOK_EVERY_SECONDS = 0.05


class CheckpointParts:
    """The parts that processes write of one checkpoint after another.

    Args:
        rank: this process.
        processes: number of processes; all of them write each checkpoint.
    """

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self._number = 0
        self._store: PrefixStore | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write this process's part of the next checkpoint inside."""
        self._number += 1
        try:
            yield
        finally:
            self._note_end()

    def wait_for_others(self) -> None:
        """Wait until each process has written its part of this checkpoint, or has failed to, but not for ever."""
        if self.processes == 1 or not self._number:
            return
        keys = [self._key(rank) for rank in range(self.processes)]
        until = time.monotonic() + _SECONDS_FOR_OTHERS
        # A process that keeps the store may have ended.
        with contextlib.suppress(RuntimeError, KeyError):
            while time.monotonic() < until and not self._joined().check(keys):
                time.sleep(_LOOK_EVERY_SECONDS)

    def _note_end(self) -> None:
        # A checkpoint that is written does not fail because a message about it is not delivered.
        if self.processes > 1:
            with contextlib.suppress(RuntimeError, KeyError):
                self._joined().set(self._key(self.rank), "")

    def _key(self, rank: int) -> str:
        return f"{self._number}/{rank}"

    def _joined(self) -> PrefixStore:
        if self._store is None:
            self._store = connect("checkpoints")
        return self._store
