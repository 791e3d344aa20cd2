"""Kill a run at random moments, resume it, and compare the result with an uninterrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from qwen_vl_sft.checkpointing import checkpoints, manifest
from qwen_vl_sft.checkpointing.row_log import NAME, read_row_log
from qwen_vl_sft.checkpointing.run_folder import LOG
from qwen_vl_sft.distributed.ports import free_port
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.shipped_files import launch_config, script


@dataclass(frozen=True)
class Trial:
    """One kill. Seconds count from the first step; `half_written` are checkpoints that the kill left unfinished."""

    seconds: float
    steps_done: int
    resumed_from: int
    half_written: int
    same_weights: bool
    same_rows: bool
    same_losses: bool

    @property
    def same(self) -> bool:
        """Return whether weights, rows and losses equal those of the uninterrupted run."""
        return self.same_weights and self.same_rows and self.same_losses


@dataclass(frozen=True)
class Experiment:
    """Runs of one recipe on some processes; `words` are keys of the recipe as on the command line of scripts/sft.py.

    SIGKILL goes to every process of a run, another `signal` to the one that was started. `config` is one of
    accelerate_configs/, for runs of several processes.
    """

    words: tuple[str, ...]
    processes: int
    folder: Path
    signal: signal.Signals = signal.SIGKILL
    config: str = "cpu"

    def run(self, kills: int, seed: int, tell: Callable[[Trial], None]) -> list[Trial]:
        """Run once uninterrupted, then `kills` times killed and resumed. Raises `UserError` if a run fails by itself."""
        whole = self.folder / "whole"
        seconds = self._finish(whole)
        moments = random.Random(seed)
        trials = []
        for number in range(kills):
            trial = self._trial(whole, self.folder / f"killed-{number}", moments.uniform(0, seconds))
            tell(trial)
            trials.append(trial)
        return trials

    def _trial(self, whole: Path, folder: Path, after: float) -> Trial:
        self._kill(folder, after)
        steps_done = max(read_row_log(folder), default=0)
        left = checkpoints.folders(folder)
        good = [path for path in left if manifest.problem_of(path) is None]
        self._finish(folder)
        trial = Trial(
            seconds=round(after, 2),
            steps_done=steps_done,
            resumed_from=int(good[-1].name.split("-")[1]) if good else 0,
            half_written=len(left) - len(good),
            same_weights=_weights(whole) == _weights(folder),
            same_rows=read_row_log(whole) == read_row_log(folder),
            same_losses=_losses(whole) == _losses(folder),
        )
        if trial.same:
            shutil.rmtree(folder)
        return trial

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch_config(self.config))]
        launcher += ["--num_processes", str(self.processes), "--main_process_port", str(free_port())]
        command = [sys.executable, *(launcher if self.processes > 1 else []), str(script("sft")), *self.words]
        command += ["--output_dir", str(folder), "--resume_from_checkpoint", checkpoints.LATEST]
        command += ["--log_row_ids", "true"]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def _finish(self, folder: Path) -> float:
        """Run to the end, and return the seconds from the first step on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        process = self._start(folder)
        self._wait_for_step(process, folder)
        began = time.monotonic()
        if process.wait() != 0:
            raise UserError(
                f"the run in {folder} failed with exit code {process.returncode}; see {self.folder}/output.txt"
            )
        return time.monotonic() - began

    def _kill(self, folder: Path, after: float) -> None:
        process = self._start(folder)
        self._wait_for_step(process, folder)
        time.sleep(after)
        if self.signal == signal.SIGKILL:
            kill_family(process.pid)
        else:
            process.send_signal(self.signal)
        process.wait()

    def _wait_for_step(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        log = folder / NAME.format(rank=0)
        before = log.stat().st_mtime_ns if log.exists() else None
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.05)


def kill_family(pid: int) -> None:
    """Kill a process and everything that it started with SIGKILL, data loader workers included."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        # Stopped first, so that none starts another on the way.
        _signal(process, signal.SIGSTOP)
    for process in family:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(family[1:], timeout=30)


def table(trials: list[Trial]) -> str:
    """Format a line for each kill."""
    lines = ["kill   after s   steps done   resumed from   half-written   weights  rows  losses"]
    for number, trial in enumerate(trials, start=1):
        same = ["same" if same else "OTHER" for same in (trial.same_weights, trial.same_rows, trial.same_losses)]
        lines.append(
            f"{number:>4}{trial.seconds:>10.2f}{trial.steps_done:>13}{trial.resumed_from:>15}{trial.half_written:>15}"
            f"{same[0]:>10}{same[1]:>6}{same[2]:>8}"
        )
    return "\n".join(lines)


def as_json(trials: list[Trial]) -> list[dict[str, object]]:
    """Convert trials to plain values."""
    return [asdict(trial) for trial in trials]


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _weights(run: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("*.safetensors")}


def _losses(run: Path) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    names = ("loss", "eval_loss")
    return [(entry["step"], entry[name]) for entry in entries for name in names if name in entry]
