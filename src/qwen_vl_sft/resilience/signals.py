"""Handle requests to stop: SIGTERM, SIGUSR1, Ctrl-C, or the death of the launcher.

Before training there is nothing to save, and the process ends at once. While training, the step is finished first; all
processes then agree, save, and end with exit code 75. No heavy import here: signals are watched from the first moment.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.errors import EXIT_PREEMPTED

PREEMPTED = "preempted.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A second Ctrl-C within this many seconds may be the launcher's copy of the first.
_REPEAT_SECONDS = 1.0
_PARENT_POLL_SECONDS = 1.0
_LAUNCHER_GONE = "the end of its launcher"
# Python's own handlers wait until the main thread is back in Python.
_HANDLER_SECONDS = 1.0
# Time for a process without its launcher to save; a hung one must not hold its GPU for ever.
_ORPHAN_SECONDS = 300.0


class SignalWatcher:
    """Notes a request to stop, or ends the process at once while there is nothing to save."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._folder: Path | None = None
        self._release: Callable[[], None] | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()
        self._launcher: int | None = None
        self._signal_pipe: int | None = None
        # Shared with the workers of data loaders, which are forked.
        self._training = mmap.mmap(-1, 1)

    def begin(self) -> None:
        """Handle signals from now on. Under a launcher, watch that it is alive too."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        heard, self._signal_pipe = os.pipe()
        os.set_blocking(self._signal_pipe, False)
        signal.set_wakeup_fd(self._signal_pipe, warn_on_full_buffer=False)
        # Signals to a forked process must not wake this one.
        os.register_at_fork(after_in_child=_ignore_signal_pipe)
        threading.Thread(target=self._end_when_stuck, args=(heard,), daemon=True).start()
        if _has_launcher():
            self._launcher = os.getppid()
            threading.Thread(target=self._watch_parent, args=(self._launcher,), daemon=True).start()

    def report_stop_in(self, folder: Path) -> None:
        """Write `preempted.json` into this run folder, if it exists, when the process is stopped before training."""
        self._folder = folder

    def release_when_stopped(self, release: Callable[[], None]) -> None:
        """Call `release` when the process is stopped before training, where nothing else is run any more."""
        self._release = release

    @property
    def reason_of_all(self) -> str:
        """Return the stop reason, as far as this process knows it."""
        if self.reason is None and self._launcher not in (None, os.getppid()):
            return _LAUNCHER_GONE  # another process has noticed first
        return self.reason or "a signal to another process"

    @property
    def training(self) -> bool:
        """Return whether there is something to save."""
        return self._training[0] == 1

    @training.setter
    def training(self, value: bool) -> None:
        self._training[0] = int(value)

    def keep_workers(self) -> None:
        """Keep data loader workers alive through a signal while training: the step needs them, and a job signals them too.

        Call it before any data loader is read.
        """
        from qwen_vl_sft.compat.for_torch import handle_sigterm_in_workers

        handle_sigterm_in_workers(self._handle)

    @contextlib.contextmanager
    def while_training(self) -> Iterator[None]:
        """Save on a signal inside this context; afterwards restore the earlier signal handlers."""
        self.training = True
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Restore the earlier signal handlers."""
        self.training = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            if self._signal_pipe is not None:
                signal.set_wakeup_fd(-1)
                os.close(self._signal_pipe)
                self._signal_pipe = None

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            self._handle_in_worker(number)
        elif self.reason is None:
            self._stop(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._since > _REPEAT_SECONDS:
            print("stopped again: ended without saving", file=sys.stderr, flush=True)
            os._exit(EXIT_PREEMPTED)
        # Slurm and launchers repeat SIGTERM; it changes nothing while the checkpoint is written.

    def _handle_in_worker(self, number: int) -> None:
        """Handle a signal in a process forked from this one, which inherits the handlers."""
        if self.training:
            return
        if number == signal.SIGTERM:
            # How a data loader ends workers that it kept. One that died of the signal would count as a failure.
            os._exit(0)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _stop(self, reason: str) -> None:
        self.reason, self._since = reason, time.monotonic()
        if self.training:
            return
        if self._release is not None:
            self._release()
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"stopped by {reason} before training began; there is nothing to save", file=sys.stderr, flush=True)
            if self._folder is not None and self._folder.is_dir():
                write_preempted(self._folder, reason, None, None)
        os._exit(EXIT_PREEMPTED)

    def _end_when_stuck(self, heard: int) -> None:
        """End a process whose main thread waits inside a library, for other processes to join say, and runs no handler."""
        while received := os.read(heard, 1):
            before = not self.training
            time.sleep(_HANDLER_SECONDS)
            if before and not self.training and self._signal_pipe is not None and received[0] in SIGNALS:
                self._stop(signal.Signals(received[0]).name)
        os.close(heard)

    def _watch_parent(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        if self.reason is None:
            self._stop(_LAUNCHER_GONE)
        time.sleep(_ORPHAN_SECONDS)
        print("the launcher is gone and this process did not end by itself", file=sys.stderr, flush=True)
        os._exit(EXIT_PREEMPTED)


def write_preempted(folder: Path, reason: str, step: int | None, checkpoint: Path | None) -> None:
    """Write `preempted.json` into the run folder, since launchers turn every exit code into 1."""
    entry = {"reason": reason, "step": step, "checkpoint": checkpoint.name if checkpoint else None}
    atomic_write(folder / PREEMPTED, json.dumps(entry) + "\n")


def _ignore_signal_pipe() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread than the main one
        signal.set_wakeup_fd(-1)


def _has_launcher() -> bool:
    """Return whether the parent is a launcher, without which this process must end. A shell may end earlier."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    return any("accelerate" in Path(word).name or word.startswith("accelerate.") for word in words[:3])
