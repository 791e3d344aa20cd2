"""Faults in whole runs, built in by faulty_run.py: NaN, no memory, a full disk, a bug on one process."""

import contextlib
import json
import math
import os
import runpy
import sys
import time
import traceback
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback

from fixtures.faulty_run import faulty_loss, faulty_save
from fixtures.faulty_runs import KEYS
from fixtures.models import qwen2_vl
from fixtures.processes import launch
from fixtures.repository import REPOSITORY
from fixtures.trainers import make_trainer
from qwen_vl_sft.checkpointing.checkpoints import folders
from qwen_vl_sft.checkpointing.manifest import problem_of
from qwen_vl_sft.checkpointing.row_log import read_row_log
from qwen_vl_sft.distributed.agreement import Agreement
from qwen_vl_sft.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, exits_with_user_errors
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.training.trainer import VisionSFTTrainer


class Exit(Exception):
    """Stands for the hard exit of a script."""


@dataclass
class Finished:
    returncode: int
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs scripts/sft.py with a fault in this process, or under the launcher on two."""

    def leave(code):
        raise Exit(code)

    def start(fault, processes=1, config="cpu", **keys):
        monkeypatch.setenv("FAULT", fault)
        named = {**KEYS, "output_dir": tmp_path / "run", **keys}
        words = [word for key, value in named.items() for word in (f"--{key}", str(value))]
        if processes > 1:
            return launch(config, REPOSITORY / "tests/fixtures/faulty_run.py", *words, processes=processes)
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setattr(sys, "argv", ["scripts/sft.py", *words])
        monkeypatch.setattr(SignalWatcher, "begin", lambda watch: None)
        monkeypatch.setattr(VisionSFTTrainer, "compute_loss", faulty_loss)
        monkeypatch.setattr(torch, "save", faulty_save)
        monkeypatch.chdir(REPOSITORY)
        with pytest.raises(Exit) as code:
            runpy.run_path("scripts/sft.py", run_name="__main__")
        return Finished(code.value.args[0], capsys.readouterr().err)

    return start


def whole(folder):
    return [path.name for path in folders(folder) if problem_of(path) is None]


@pytest.mark.parametrize(("fault", "processes"), [("nan", 2), ("nan_gradient", 1)])
def test_a_step_that_is_not_finite_stops_the_run_with_its_rows(fault, processes, run, tmp_path):
    finished = run(fault, processes)
    assert finished.returncode == (EXIT_USER_ERROR if processes == 1 else 1), finished.stderr[-3000:]
    step, rows = next((step, rows) for step, rows in read_row_log(tmp_path / "run").items() if 3 in rows)
    what = "the loss of row(s) 3 is NaN" if fault == "nan" else "the gradient is NaN or infinite"
    assert f"error: step {step}: {what}" in finished.stderr
    assert f"of the step: {', '.join(map(str, rows))}" in finished.stderr
    assert "nonfinite: skip" in finished.stderr
    assert all(int(name.split("-")[1]) < step for name in whole(tmp_path / "run"))


@pytest.fixture
def late(monkeypatch):
    """Flags that are read a step later, as on a GPU."""

    def begin(agreement, device):
        agreement.on_gpu, agreement._result, agreement._copied = True, None, None

    monkeypatch.setattr(Agreement, "__init__", begin)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


EPOCHS = {"save_strategy": "epoch", "global_batch_size": 8, "max_steps": 3}


@pytest.mark.parametrize(
    ("fault", "step", "keys"), [("nan", 1, EPOCHS), ("told_then_nan", 3, {"save_steps": 5}), ("nan", None, {})]
)
def test_such_a_step_is_never_saved_though_it_is_read_late(fault, step, keys, run, late, tmp_path):
    finished = run(fault, **keys)
    assert finished.returncode == EXIT_USER_ERROR
    step = step or next(step for step, rows in read_row_log(tmp_path / "run").items() if 3 in rows)
    assert f"error: step {step}: the loss of row(s)" in finished.stderr
    assert all(int(path.name.split("-")[1]) < step for path in folders(tmp_path / "run"))


def test_a_run_that_is_told_to_stop_where_it_saves_anyway_stops_there(run, late, tmp_path):
    finished = run("told", **{**EPOCHS, "max_steps": 4})
    assert finished.returncode == EXIT_PREEMPTED
    assert "stopped by SIGTERM after step 2 of 4" in finished.stderr
    assert whole(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def test_such_steps_are_left_out_and_counted_on_all_processes(run, tmp_path):
    finished = run("nan", processes=2, nonfinite="skip")
    assert finished.returncode == 0, finished.stderr[-3000:]
    log = read_row_log(tmp_path / "run")
    steps = [step for step, rows in log.items() if 3 in rows]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["skipped_steps"] == len(steps) >= 1
    assert math.isfinite(metrics["train_loss"])
    assert f"skipped: step {steps[0]}: the loss of row(s) 3 is NaN" in finished.stdout
    weights = load_file(tmp_path / "run/adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_out_of_memory_names_the_batch(run):
    finished = run("memory")
    assert finished.returncode == EXIT_USER_ERROR
    assert "error: out of memory in a micro-batch of 1 row(s) (row_id 3), 1 x " in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("fault", "processes", "config"),
    [("disk", 1, None), ("disk", 2, "cpu"), pytest.param("disk_of_one", 2, "fsdp2", marks=pytest.mark.long)],
)
def test_a_full_disk_keeps_the_last_good_checkpoint(fault, processes, config, run, tmp_path):
    finished = run(fault, processes, config)
    assert finished.returncode == (EXIT_USER_ERROR if processes == 1 else 1), finished.stderr[-3000:]
    assert "could not be written" in finished.stderr
    assert "No space left on device. The last good checkpoint is " in finished.stderr
    assert whole(tmp_path / "run") == ["checkpoint-2"]
    assert not (tmp_path / "run/checkpoint-4").exists()


def test_a_bug_on_one_process_shows_its_traceback_first(run):
    finished = run("bug", processes=2)
    assert finished.returncode == 1
    text = finished.stderr
    assert "AssertionError: a bug of process 0" in text
    assert text.index("Traceback") < text.index("AssertionError: a bug of process 0")
    later = text.find("another process has ended")
    assert later == -1 or text.index("AssertionError: a bug of process 0") < later


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (
            torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3353, unhandled\nno shared memory"),
            True,
        ),
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (KeyError("a bug"), False),
        (CheckpointException("write", {0: (KeyError("a bug"), traceback.StackSummary())}), False),
    ],
)
def test_whatever_ends_one_process_of_several_is_shown(error, waits, monkeypatch, capsys, tmp_path):
    def leave(code):
        raise Exit(code)

    @exits_with_user_errors
    def main():
        raise error

    slept = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "2",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exit, match="1"):
        main()
    told = capsys.readouterr().err
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == told.removesuffix("\n")
    assert told.startswith("Traceback")
    assert str(error) in told
    last = f"process 2: a collective failed, mostly because another process has ended, whose message then says why: {error}"
    assert slept == ([5] if waits else [])
    assert (told.splitlines()[-1] == last.splitlines()[0]) == waits


@pytest.fixture
def fp16(ragged, tiny_processor, tmp_path, monkeypatch):
    """Makes trainers with a real gradient scaler, which accelerate has on GPUs alone; they check each step."""

    def make(scale, **keys):
        trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **keys)
        accelerator = trainer.accelerator
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=scale), True
        monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        # What it computes with is beside the point, and the CPU may not have it.
        trainer.autocast_smart_context_manager = contextlib.nullcontext
        accelerator.prepare_model = lambda model, **options: model
        checks = TrainerCallback()
        checks.on_step_end = lambda args, state, control, **others: stop_if_not_finite(trainer)
        trainer.add_callback(checks)
        return trainer

    return make


def stop_if_not_finite(trainer):
    if trainer.guard.record.not_finite(trainer.args.device):
        trainer.guard.stop(trainer.state.global_step, trainer.guard.record)


def test_a_gradient_scaler_that_looks_for_its_scale_is_no_fault(fp16):
    trainer = fp16(2.0**127, max_steps=14)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert not math.isfinite(norms[0])
    assert math.isfinite(norms[-1])
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert any(not weight.equal(before[name]) for name, weight in trainer.model.named_parameters())


def test_a_gradient_that_no_scale_helps_ends_the_run(fp16, monkeypatch):
    trainer = fp16(2.0**16, max_steps=40)
    monkeypatch.setenv("FAULT", "nan_gradient")
    monkeypatch.setattr(VisionSFTTrainer, "compute_loss", faulty_loss)
    with pytest.raises(
        UserError, match=r"step 16: the gradient is NaN .* in 16 steps in a row, with a smaller loss scale"
    ):
        trainer.train()


@pytest.mark.parametrize(("method", "step"), [("__init__", 0), ("add_scalar", 1), ("flush", 1), ("close", 2)])
def test_a_logger_that_is_down_does_not_end_a_run(method, step, ragged, tiny_processor, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, method, fail)
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(calls) == 1
    told = f"OSError: [Errno 28] No space left on device, at step {step}"
    assert trainer.failed_loggers == {"tensorboard": told}
    assert capsys.readouterr().err.count(f"warning: report_to: tensorboard failed ({told})") == 1


def test_a_logger_that_is_up_is_told_everything(ragged, tiny_processor, tmp_path):
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, report_to="tensorboard")
    trainer.train()
    assert trainer.failed_loggers == {}
    (events,) = (tmp_path / "run").rglob("events.out.*")
    assert b"train/loss" in events.read_bytes()
