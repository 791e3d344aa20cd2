"""The same seed on the same machine gives the same run, bit for bit; and a run folder tells what it came from."""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fixtures.processes import launch
from fixtures.repository import REPOSITORY
from qwen_vl_sft import tiny
from qwen_vl_sft.checkpointing import run_folder
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.training import sft
from qwen_vl_sft.training.resolve import resolve
from qwen_vl_sft.training.trainer import VisionSFTTrainer
from qwen_vl_sft.training.trainer_setup import sft_config

KEYS = {
    "recipe": "recipes/quickstart.yaml",
    "max_steps": 6,
    "max_train_samples": 16,
    "max_eval_samples": 8,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "predict_with_generate": "false",
    "per_device_train_batch_size": 2,
    "global_batch_size": 4,
    "dataloader_num_workers": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
}
# Prefixes cannot be shared with dropout.
PACKED = {"packing": "true", "tokens_per_batch": 512, "share_prefixes": "true", "fused_kernels": "auto"}
# How long things took.
CLOCK = ("second", "runtime", "time", "wait", "tflops", "mfu")


def words(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def outcome(run):
    """Every logged number but those of the clock, and the adapter's bytes."""
    entries = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    told = [{name: entry[name] for name in entry if not any(part in name for part in CLOCK)} for entry in entries]
    assert sum("loss" in entry for entry in told) == KEYS["max_steps"]
    assert sum("eval_loss" in entry for entry in told) == 2
    return told, (run / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains in this process."""

    leave, own = os._exit, os.getpid()

    def told(code):
        if os.getpid() != own:  # a worker of a data loader
            leave(code)
        raise AssertionError(f"it ended with exit code {code}")

    def run(name, **keys):
        monkeypatch.setattr(os, "_exit", told)
        monkeypatch.setattr(sys, "argv", ["scripts/sft.py", *words({**KEYS, "output_dir": tmp_path / name, **keys})])
        monkeypatch.setattr(SignalWatcher, "begin", lambda watch: None)
        monkeypatch.chdir(REPOSITORY)
        runpy.run_path("scripts/sft.py", run_name="__main__")
        return tmp_path / name

    return run


def test_one_process_packed_with_workers(train):
    first = outcome(train("first", **PACKED))
    torch.rand(7)  # what a process has drawn before is no part of a run
    folder = train("second", **PACKED)
    assert outcome(folder) == first
    told = json.loads((folder / "environment.json").read_text())
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]
    assert told["world"]["strategy"] == "single"
    assert told["chosen"] == {"attention": "sdpa", "fused_kernels": ["patch_embed", "lora"]}
    assert told["data"]["train"]["rows"] == 16
    assert told["data"]["train"]["fingerprint"]
    assert told["git_commit"] == run_folder._git_commit()
    assert read_recipe(folder / "recipe.yaml", {}).run.tokens_per_batch == 512
    other = outcome(train("other", seed=43, **PACKED))
    assert other[1] != first[1], "the seed decides"


@pytest.mark.parametrize("keys", [{}, PACKED], ids=["padded", "packed"])
def test_kept_workers_end_with_the_training(train, monkeypatch, keys):
    """Else each would hold up the end of a process with a GPU for five seconds."""
    during, after = [], []
    step, finish = VisionSFTTrainer.training_step, sft.finish_run_folder

    def watched_step(*args, **kwargs):
        during.append(multiprocessing.active_children())
        return step(*args, **kwargs)

    def watched_finish(*args):
        after.append(multiprocessing.active_children())
        finish(*args)

    monkeypatch.setattr(VisionSFTTrainer, "training_step", watched_step)
    monkeypatch.setattr(sft, "finish_run_folder", watched_finish)
    train("run", max_steps=2, eval_steps=1, dataloader_persistent_workers="true", **keys)
    # Two train; once evaluated, two more stand ready for the next evaluation.
    assert (len(during[0]), len(during[-1]), after) == (2, 4, [[]])


@pytest.mark.parametrize("tf32", [False, None])
def test_float32_is_float32_in_convolutions_too(tf32, tmp_path, monkeypatch):
    """The vision tower's first layer is one; `tf32: false` of transformers does not reach it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    keys = {"model_name_or_path": str(tiny.MODEL_DIR), "dataset_name": "data", "use_cpu": True, "bf16": False}
    recipe = read_recipe(None, {**keys, "output_dir": str(tmp_path), **({} if tf32 is None else {"tf32": tf32})})
    sft_config(resolve(recipe, DistributedContext("single", 1, 0, 0, on_cpu=True)))
    assert torch.backends.cudnn.allow_tf32 == (tf32 is None)


@pytest.mark.long
def test_two_processes_with_dropout(tmp_path):
    keys = {**KEYS, "lora_dropout": 0.1}
    found = []
    for name in ("first", "second"):
        finished = launch("cpu", "scripts/sft.py", *words({**keys, "output_dir": tmp_path / name}))
        assert finished.returncode == 0, finished.stderr[-3000:]
        found.append(outcome(tmp_path / name))
    assert found[0] == found[1]


# The folder


def used(folder):
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4/optimizer.pt").touch()
    (folder / "recipe.yaml").touch()
    return folder


def test_a_used_folder_is_emptied_and_stays_the_link_that_it_was(tmp_path):
    scratch, run, other = used(tmp_path / "scratch"), tmp_path / "run", tmp_path / "other"
    run.symlink_to(scratch)
    other.mkdir()
    (other / "kept").touch()
    (scratch / "link").symlink_to(other)
    run_folder.begin(run, True, "key: value", None, {})
    assert run.is_symlink()
    assert sorted(path.name for path in scratch.iterdir()) == ["environment.json", "recipe.yaml", "system_message.txt"]
    assert (other / "kept").is_file()


def test_a_folder_that_cannot_be_emptied_or_finished_is_told(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    run = used(tmp_path / "run")
    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(UserError, match="run cannot be written: Read-only file system; name another folder"):
        run_folder.begin(run, True, "", None, {})
    writer = CheckpointWriter(run, {}, None, newest_own_step=4)
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=[]), writer=writer)
    monkeypatch.setattr(run_folder, "finish", fails)
    with pytest.raises(UserError, match=r"metrics of the finished model could not be written .*Read-only file system"):
        sft.finish_run_folder(trainer, run, {})


# The commit


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a copy of the module that asks for its commit."""
    package = tmp_path / "repository/src"
    package.mkdir(parents=True)
    module = package / "checkpointing/run_folder.py"
    module.parent.mkdir()
    shutil.copy(run_folder.__file__, module)
    monkeypatch.setattr(run_folder, "__file__", str(module))
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    return package


def git(folder, *command):
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *name, *command], cwd=folder, check=True, capture_output=True)


def test_the_commit_says_whether_the_code_was_changed(checkout):
    assert run_folder._git_commit() is None
    git(checkout, "init")
    git(checkout, "commit", "--allow-empty", "-m", "of something else")
    assert run_folder._git_commit() is None, "the package is no part of this repository"
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "one")
    clean = run_folder._git_commit()
    assert len(clean) == 40
    (checkout / "new.py").touch()
    assert run_folder._git_commit() == f"{clean}-dirty"
    (checkout / "new.py").unlink()
    assert run_folder._git_commit() == clean
    with (checkout / "checkpointing/run_folder.py").open("a") as file:
        file.write("\n")
    assert run_folder._git_commit() == f"{clean}-dirty"
