"""A watchdog for hung collectives: it ends the run, and reports what each process was doing.

Otherwise the communication library's own timeout would end the run, and name a tensor instead of the cause.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

from torch.distributed import PrefixStore

from qwen_vl_sft.distributed.store import connect
from qwen_vl_sft.errors import leave

STACKS = "stalled-rank-{rank}.txt"
# This report comes before the communication library's own timeout.
_SHARE_OF_TIMEOUT = 0.9
_LOOK_EVERY_SECONDS = 5.0
# Lines of a report, and functions of a line, the innermost ones.
_SHOWN = 32
_FUNCTIONS = 5
# Files of the innermost functions while a collective waits; in the backward pass it is called from torch's own threads.
_WAITING_IN = ("torch/distributed/", "torch/nn/parallel/distributed.py", "deepspeed/comm/", "zero/partition_parameters")
_INNERMOST = 3
_BACKWARD = "_engine_run_backward"


class Stage(IntEnum):
    """Stages of a step in order; an evaluation and a checkpoint belong to the step before them."""

    DATA, TOKENS, MICRO_BATCHES, GRADIENT, END, EVALUATION, SAVE = range(7)


@dataclass(frozen=True)
class Standing:
    """What a process is doing, and for how many seconds. `place` increases during a run, in the same way on all processes.

    `functions` are the innermost functions of the main thread; `waits` is true if it waits for other processes.
    """

    doing: str
    place: tuple[int, ...]
    seconds: float
    functions: str
    waits: bool

    def __str__(self) -> str:
        return f"{self.doing}, for {self.seconds:,.0f} s; in {self.functions}"


class Watchdog(threading.Thread):
    """Ends this process, with exit code 1, when one of the run has not moved for most of `ddp_timeout`.

    The first process to notice asks all of them what they are doing, and writes that to the standard error; each leaves
    the stacks of its threads in `stalled-rank-N.txt` of the run folder.

    Start it when processes begin to wait for each other. Until then it only notes progress.

    Args:
        folder: the run folder.
        rank: this process.
        processes: number of processes.
        timeout: `ddp_timeout`, seconds.
    """

    def __init__(self, folder: Path, rank: int, processes: int, timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.rank, self.processes = folder, rank, processes
        self.limit = timeout * _SHARE_OF_TIMEOUT
        self.interval = min(_LOOK_EVERY_SECONDS, self.limit / 40)
        self._now: tuple[str, tuple[int, ...], float] = ("starting", (0,), time.monotonic())
        self._ended = threading.Event()
        self._store: PrefixStore | None = None
        self._can_ask = True

    def report_progress(self, doing: str, *place: int) -> None:
        """Note what this process does next: `place` is step, stage, and a number."""
        self._now = (doing, place, time.monotonic())

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def run(self) -> None:
        """Look at intervals, until the end or a stall here or elsewhere."""
        seen, silent, looked = self._now, 0.0, time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # Time in which the job was suspended does not count.
            silent = silent + min(now - looked, 2 * self.interval) if self._now is seen else 0.0
            seen, looked = self._now, now
            if silent > self.limit or self._is_asked():
                self._report()

    def _is_asked(self) -> bool:
        """Return whether another process has noticed a stall. Without a store, each watches for itself."""
        if not self._can_ask:
            return False
        try:
            return bool(self._joined().check(["reporters"]))
        except (RuntimeError, KeyError):
            # A second attempt would take as long, and torch logs each one.
            self._can_ask = False
            return False

    def _report(self) -> None:
        # Should anything below hang, such as a write to a full pipe, the process still ends.
        faulthandler.dump_traceback_later(10 * self._patience(), exit=True, file=sys.__stderr__ or sys.stderr)
        # Until Python 3.12, looking at other threads' frames while garbage is collected may hang
        # (https://github.com/python/cpython/issues/106883).
        gc.disable()
        doing, place, since = self._now
        standing = Standing(doing, place, time.monotonic() - since, *_main_thread())
        self._write_stacks(standing)
        try:
            message, speaks = self._exchange(standing)
        except (RuntimeError, KeyError):  # the store ends with the process that keeps it
            known = [standing if rank == self.rank else None for rank in range(self.processes)]
            message, speaks = format_report(known, self.limit, self.folder), True
        leave(1, message, show=speaks)

    def _exchange(self, standing: Standing) -> tuple[str, bool]:
        """Return the report (its first line on all processes but one), and whether it still has to be printed."""
        store = self._joined()
        store.set(str(self.rank), json.dumps(asdict(standing)))
        if store.add("reporters", 1) > 1:
            store.wait(["told"], timedelta(seconds=2 * self._patience()))
            return store.get("told").decode().splitlines()[0], False
        message = format_report(self._collect(store), self.limit, self.folder)
        # The others end when they read this, and the launcher then ends this process.
        print(message, file=sys.stderr, flush=True)
        store.set("told", message)
        return message, False

    def _patience(self) -> float:
        """Return the seconds within which every responding process has noticed."""
        return 3 * self.interval + 5

    def _collect(self, store: PrefixStore) -> list[Standing | None]:
        ranks = [str(rank) for rank in range(self.processes)]
        until = time.monotonic() + self._patience()
        while time.monotonic() < until and not store.check(ranks):
            time.sleep(0.1)
        found = [json.loads(store.get(rank)) if store.check([rank]) else None for rank in ranks]
        return [Standing(**{**entry, "place": tuple(entry["place"])}) if entry else None for entry in found]

    def _write_stacks(self, standing: Standing) -> None:
        try:
            with (self.folder / STACKS.format(rank=self.rank)).open("w", encoding="utf-8") as file:
                file.write(f"{standing}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a full disk may be what everyone waits for; a machine may not see the run folder
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)

    def _joined(self) -> PrefixStore:
        if self._store is None:
            self._store = connect("stall")
        return self._store


def format_report(standings: Sequence[Standing | None], seconds: float, folder: Path) -> str:
    """Describe what every process was doing; None for one that did not answer."""
    lines = [f"error: a process has waited for {seconds:,.0f} s, most of ddp_timeout, and the run is ended"]
    # Those that hold the others up, when there are too many to show all.
    order = sorted(range(len(standings)), key=lambda rank: _place(standings[rank]))[:_SHOWN]
    lines += [
        f"  process {rank}: {standings[rank] or 'no answer, so it has gone or is frozen'}" for rank in sorted(order)
    ]
    if len(standings) > _SHOWN:
        lines.append(f"  and {len(standings) - _SHOWN} more, which are further on")
    lines.append(
        f"{_verdict(standings)}; {folder / STACKS.format(rank='N')} holds the stacks of each. If it was only slow, raise"
        " ddp_timeout. Resume with --resume_from_checkpoint latest"
    )
    return "\n".join(lines)


def _verdict(standings: Sequence[Standing | None]) -> str:
    places = [_place(standing) for standing in standings]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    if len(behind) < len(places):
        return f"The others wait for process {_listed(behind)}, which is furthest behind"
    alone = [rank for rank, standing in enumerate(standings) if standing and not standing.waits]
    if 0 < len(alone) < len(standings):
        return f"The others wait for process {_listed(alone)}, which is at the same point but waits for none"
    return "All are at the same point, so the one whose functions differ from the others' holds them up"


def _place(standing: Standing | None) -> tuple[int, ...]:
    return standing.place if standing else ()


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ", ".join(map(str, ranks[:_SHOWN])) + more


def _main_thread() -> tuple[str, bool]:
    """Return its innermost functions, and whether they wait for other processes."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no function", False
    line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    names: list[str] = []
    files: list[str] = []
    while frame is not None and len(names) < _FUNCTIONS:
        names.append(frame.f_code.co_name)
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    waits = names[0] == _BACKWARD or any(part in file for part in _WAITING_IN for file in files[:_INNERMOST])
    return f"{' < '.join(names)} ({line})", waits
