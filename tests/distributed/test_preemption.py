"""Runs that are told to stop, run out of time, or meet a fault: they end soon, say why, and keep what they have."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from fixtures.processes import Popen, launcher, run_process, still_there
from fixtures.repository import REPOSITORY
from qwen_vl_sft.checkpointing import save_errors
from qwen_vl_sft.checkpointing.manifest import problem_of
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import EXIT_PREEMPTED, Preempted, UserError
from qwen_vl_sft.resilience import faults, signals, stopping
from qwen_vl_sft.resilience.deadline import Deadline, parse_duration
from qwen_vl_sft.resilience.due_evaluation import DueEvaluation
from qwen_vl_sft.resilience.faults import StepRecord
from qwen_vl_sft.resilience.step_guard import StepGuard
from qwen_vl_sft.resilience.stopping import RunStopper
from qwen_vl_sft.resilience.watchdog import Watchdog

SCRIPT = "scripts/sft.py"
# In seconds, on a busy machine several times slower than most; nothing waits so long where all is well.
STARTING, ENDING = 900, 600
ENDLESS = {
    "recipe": "recipes/quickstart.yaml",
    "max_steps": 4000,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": "false",
    "predict_with_generate": "false",
    "max_train_samples": 16,
    "per_device_train_batch_size": 1,
    "global_batch_size": 2,
    "logging_steps": 1000,
    "report_to": "none",
    "log_row_ids": "true",
    "dataloader_num_workers": 1,
    "disable_tqdm": "true",
}


def words(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


class Running:
    """A run that was started, and everything that it started."""

    def __init__(self, config, folder, **keys):
        command = [sys.executable, *(launcher(config) if config else []), SCRIPT]
        self.run = folder / "run"
        self.output = folder / "output.txt"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        command += words({**ENDLESS, "output_dir": self.run, **keys})
        with self.output.open("w") as file:
            self.process = Popen(command, cwd=REPOSITORY, env=env, stdout=file, stderr=file, start_new_session=True)
        self.family = []

    def wait_for(self, found):
        assert self.reaches(found), self.output.read_text()[-3000:]
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def reaches(self, found):
        """Whether something comes before the run ends."""
        until = time.monotonic() + STARTING
        while not found():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, self.output.read_text()[-3000:]
            time.sleep(0.1)
        return True

    def has_steps(self):
        log = self.run / "row_ids-0.jsonl"
        return log.exists() and log.read_text().count("\n") > 2

    def wait_for_steps(self):
        self.wait_for(self.has_steps)

    def trainers(self):
        return [entry for entry in self.family if SCRIPT in entry.cmdline()]

    def end(self, within):
        """The exit code, when nothing of the run is left."""
        assert still_there(self.family, within) == []
        return self.process.wait(within)

    def kill(self):
        for entry in [*self.family, self.process]:
            try:
                entry.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture
def start(tmp_path):
    started = []

    def run(config, folder="", **keys):
        (tmp_path / folder).mkdir(exist_ok=True)
        started.append(Running(config, tmp_path / folder, **keys))
        return started[-1]

    yield run
    for entry in started:
        entry.kill()


def check_stopped(running, reason):
    mark = json.loads((running.run / signals.PREEMPTED).read_text())
    assert mark["reason"] == reason
    assert problem_of(running.run / f"checkpoint-{mark['step']}") is None
    assert mark["checkpoint"] == f"checkpoint-{mark['step']}"
    assert not list(running.run.glob("*.safetensors")), "the model of a run that is not finished"
    assert not (running.run / "metrics.json").exists()
    assert f"stopped by {reason} after step {mark['step']} of 4000" in running.output.read_text()
    return mark["step"]


def test_ctrl_c_saves_and_ends_with_75(start):
    """A terminal sends it to the whole group, data loaders' workers included."""
    running = start(None)
    running.wait_for_steps()
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end(within=ENDING) == EXIT_PREEMPTED
    check_stopped(running, "SIGINT")


def test_a_stopped_run_goes_on_and_forgets_that_it_was_stopped(start):
    """Slurm signals every process of a job."""
    running = start(None)
    running.wait_for_steps()
    for entry in [*running.family, running.process]:
        entry.send_signal(signal.SIGTERM)
    assert running.end(within=ENDING) == EXIT_PREEMPTED
    step = check_stopped(running, "SIGTERM")
    keys = {**ENDLESS, "output_dir": running.run, "resume_from_checkpoint": "latest", "max_steps": step + 1}
    finished = run_process(SCRIPT, *words(keys))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert f"resumes     checkpoint-{step}, after step {step}\n" in finished.stdout
    assert not (running.run / signals.PREEMPTED).exists()
    assert (running.run / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("config", "number", "whom", "reason"),
    [
        ("cpu", signal.SIGUSR1, "one trainer", "SIGUSR1"),
        ("cpu", signal.SIGKILL, "launcher", "the end of its launcher"),
        ("fsdp2", signal.SIGTERM, "all", "SIGTERM"),
    ],
)
def test_all_processes_agree_under_the_launcher(config, number, whom, reason, start):
    running = start(config)
    running.wait_for_steps()
    trainers = running.trainers()
    assert len(trainers) >= 2
    for entry in {
        "launcher": [running.process],
        "one trainer": trainers[:1],
        "all": [running.process, *running.family],
    }[whom]:
        entry.send_signal(number)
    assert running.end(within=ENDING) != 0
    check_stopped(running, reason)


def test_the_first_process_knows_why_though_another_has_noticed_first():
    watch = signals.SignalWatcher()
    assert watch.reason_of_all == "a signal to another process"
    watch._launcher = os.getppid()
    assert watch.reason_of_all == "a signal to another process"
    watch._launcher = 2**22 + 1  # no process has such a number
    assert watch.reason_of_all == "the end of its launcher"
    watch.reason = "SIGUSR1"
    assert watch.reason_of_all == "SIGUSR1"


def test_before_training_it_ends_at_once_with_nothing_to_save(start):
    running = start(None)
    running.wait_for(lambda: "model " in running.output.read_text())
    running.process.send_signal(signal.SIGTERM)
    assert running.end(within=ENDING) == EXIT_PREEMPTED
    assert "stopped by SIGTERM before training began; there is nothing to save" in running.output.read_text()
    assert not running.run.exists()


# A mutex that is taken twice: the main thread waits in a library, and no signal wakes it.
STUCK = """
import ctypes, os, signal, sys, time
from qwen_vl_sft.resilience.signals import SignalWatcher
watch = SignalWatcher()
watch.begin()
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
heard, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b".")
    time.sleep(3600)
    os._exit(1)
os.read(heard, 1)
os.kill(child, signal.SIGTERM)
os.waitpid(child, 0)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_is_stuck_in_a_library_ends_too(number):
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        # What its child was told has not ended it.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2 * signals._HANDLER_SECONDS)
        process.send_signal(number)
        _, told = process.communicate(timeout=ENDING)
    finally:
        process.kill()
    assert process.returncode == EXIT_PREEMPTED
    assert told.decode().strip() == f"stopped by {number.name} before training began; there is nothing to save"


def test_a_run_ends_before_its_time_is_up(start):
    began = time.monotonic()
    measured = start(None, folder="measured")
    measured.wait_for_steps()
    # What this machine takes to start a run tells what it takes to end one.
    starting = time.monotonic() - began
    measured.kill()
    for factor in (2, 4, 8, 16):
        limit = 5 + round(factor * starting)
        began = time.monotonic()
        running = start(None, folder=f"{limit}s", max_run_time=f"{limit}s")
        # Where other programs have the CPU meanwhile, the time may be up before the first step.
        if running.reaches(running.has_steps):
            break
    running.wait_for_steps()
    starting = max(starting, time.monotonic() - began)
    assert running.end(within=limit + ENDING) == EXIT_PREEMPTED
    assert time.monotonic() - began < limit + max(2, starting / 2)
    check_stopped(running, "max_run_time")


def test_a_process_that_dies_takes_the_group_down_and_its_end_is_told(start):
    running = start("cpu")
    running.wait_for_steps()
    trainer = next(entry for entry in running.trainers() if entry.parent().pid == running.process.pid)
    trainer.kill()
    began = time.monotonic()
    assert running.end(within=ENDING) == 1
    assert time.monotonic() - began < ENDING
    text = running.output.read_text()
    assert "Signal 9 (SIGKILL) received" in text
    assert "a collective failed, mostly because another process has ended, whose message then says why: " in text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1:30", 90), ("08:00:00", 28800), ("1-00:00:30", 86430), ("3h30m", 12600), ("2d", 172800)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1h30", "3 hours", "-5"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=text):
        parse_duration(text)


def test_the_deadline_leaves_time_for_the_save_and_the_evaluation():
    age = time.time() - psutil.Process().create_time()
    deadline = Deadline(int(age) + 100)
    assert not deadline.is_due(evaluates=True)
    deadline.note_evaluation(80.0)
    assert deadline.is_due(evaluates=True)
    assert not deadline.is_due(evaluates=False)
    deadline.note_save(70.0)
    assert deadline.is_due(evaluates=False)
    assert not Deadline(None).is_due(evaluates=True)


def make_stopper(folder, streams=False):
    cpu, never = torch.device("cpu"), SimpleNamespace(eval_strategy="no", eval_delay=0)
    return RunStopper(
        folder,
        DistributedContext("single", 1, 0, 0, True),
        cpu,
        signals.SignalWatcher(),
        Deadline(None),
        CheckpointWriter(folder, {}, None),
        StepGuard(cpu, skips=True),
        DueEvaluation(never),
        Watchdog(folder, 0, 1, 60),
        streams,
    )


@pytest.mark.parametrize(
    ("streamed", "told"),
    [(False, "Resume with --resume_from_checkpoint latest"), (True, "A stream cannot be resumed: start again")],
)
def test_a_stopped_run_is_told_what_can_be_done(streamed, told, tmp_path):
    watched = make_stopper(tmp_path, streams=streamed)
    watched.stopping = "SIGTERM"
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(Preempted, match=rf"after step 2 of 9; .*checkpoint-2 is written\. {told}"):
        watched.on_save(None, SimpleNamespace(global_step=2, max_steps=9), None)


def test_the_longest_step_is_told_with_its_data_and_without_what_follows_it(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "perf_counter", lambda: now[0])
    watched = make_stopper(tmp_path)
    control = SimpleNamespace(should_evaluate=False)
    watched.on_train_begin(None, None, control)
    for step, seconds in enumerate((3.0, 5.0, 4.0), start=1):
        now[0] += seconds
        watched.on_step_end(None, SimpleNamespace(global_step=step, max_steps=9, epoch=0.5), control)
        now[0] += 100
        watched.on_evaluate(None, None, control)
        now[0] += 100
        watched.on_save(None, None, control)
    assert watched.deadline.step == 5


# Faults


@pytest.mark.parametrize(
    ("losses", "norm", "not_finite"),
    [([1.0, 2.0], 3.0, 0), ([1.0, float("nan")], 3.0, 1), ([1.0], float("inf"), 1), ([], None, 0)],
)
def test_a_step_is_not_finite_when_anything_of_it_is_not_finite(losses, norm, not_finite):
    record = StepRecord([[1], [2]], [torch.tensor(loss) for loss in losses], norm)
    assert float(record.not_finite(torch.device("cpu"))) == not_finite


@pytest.mark.parametrize(
    ("loss", "norm", "overflows", "not_finite"),
    [(1.0, float("inf"), 1, 0), (1.0, float("nan"), 15, 0), (1.0, float("inf"), 16, 1), (float("inf"), 1.0, 0, 1)],
)
def test_a_gradient_scaler_may_leave_out_some_steps(loss, norm, overflows, not_finite):
    record = StepRecord([[1]], [torch.tensor(loss)], norm, torch.tensor(float(overflows)))
    assert float(record.not_finite(torch.device("cpu"))) == not_finite


def test_out_of_memory_names_rows_and_size():
    inputs = {"input_ids": torch.zeros(2, 700), "pixel_values": torch.zeros(1200, 4)}
    batch = faults.describe_micro_batch([7, 9], inputs)
    with pytest.raises(UserError) as error, faults.explained_out_of_memory(batch, False, False):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    for word in ("2 row(s) (row_id 7, 9)", "2 x 700 tokens", "1,200 image patches", "per_device_train_batch_size"):
        assert word in str(error.value)
    assert "gradient_checkpointing: true" in str(error.value)
    with pytest.raises(RuntimeError, match="a bug"), faults.explained_out_of_memory(batch, True, True):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        # As FSDP2's checkpoints end on all processes when one could not write.
        CheckpointException("write", {1: (OSError(28, "No space left on device"), traceback.StackSummary())}),
    ],
)
def test_a_failed_save_leaves_no_half_and_names_the_last_good(error, tmp_path):
    half = tmp_path / "checkpoint-8"
    half.mkdir()
    told = pytest.raises(UserError, match=r"could not be written .* The last good checkpoint is checkpoint-4")
    with told, save_errors.explained_save("a checkpoint", half, Path("checkpoint-4"), remove=True):
        raise error
    assert not half.exists()


def test_what_is_no_failed_write_is_no_full_disk(tmp_path):
    bug = CheckpointException("write", {0: (KeyError("a bug"), traceback.StackSummary())})
    with pytest.raises(CheckpointException), save_errors.explained_save("a checkpoint", tmp_path, None, remove=True):
        raise bug
    assert tmp_path.exists()
