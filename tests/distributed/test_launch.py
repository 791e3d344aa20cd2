"""Reading how a run was launched, with fake environments and command lines, and a few real launches on the CPU."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config import config_args
from torch import nn

from fixtures.ports import free_port
from fixtures.processes import PROCESS_TIMEOUT, Popen
from fixtures.repository import REPOSITORY
from qwen_vl_sft.distributed.context import DistributedContext, read_context
from qwen_vl_sft.distributed.launch import check_running, training_arguments
from qwen_vl_sft.distributed.launcher_request import LauncherRequest, Process, ancestors, read_launcher_request
from qwen_vl_sft.errors import UserError

CONFIGS = REPOSITORY / "accelerate_configs"
ALONE: dict[str, str] = {}
RANK_1_OF_2 = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
FSDP2 = RANK_1_OF_2 | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = RANK_1_OF_2 | {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(autouse=True)
def _same_on_every_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "no_default_config.yaml"))
    monkeypatch.setattr("qwen_vl_sft.distributed.context.find_spec", lambda name: "installed")


def read(env, asked=None, gpus=2, use_cpu=False) -> DistributedContext:
    return read_context(use_cpu, env, lambda: asked, lambda: gpus)


def refusal(env, asked=None, gpus=2, use_cpu=False) -> str:
    with pytest.raises(UserError) as error:
        read(env, asked, gpus, use_cpu)
    return str(error.value)


# What the environment says


@pytest.mark.parametrize(
    ("env", "strategy"),
    [
        (RANK_1_OF_2, "ddp"),
        (FSDP2, "fsdp2"),
        (ZERO, "zero2"),  # accelerate's default stage
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero3.json")}, "zero3"),
    ],
)
def test_strategy_and_place_come_from_the_environment(env, strategy):
    assert read(env) == DistributedContext(strategy, processes=2, rank=1, local_rank=1, on_cpu=False)


def test_one_process_without_a_launcher():
    assert read(ALONE, gpus=1) == DistributedContext("single", processes=1, rank=0, local_rank=0, on_cpu=False)


def test_a_launched_group_of_one_is_wrapped_in_ddp():
    assert read({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, gpus=1).strategy == "ddp"


@pytest.mark.parametrize(
    ("use_cpu", "env", "asked", "gpus", "on_cpu"),
    [
        (False, ALONE, None, 1, False),
        (True, ALONE, None, 1, True),
        (False, ALONE, None, 0, True),
        (False, {"ACCELERATE_USE_CPU": "true"}, None, 1, True),
        # `use_cpu: true` beside MULTI_GPU: the launcher drops it
        (False, RANK_1_OF_2, LauncherRequest("x.yaml", "MULTI_GPU", 2, on_cpu=True), 2, True),
    ],
)
def test_what_puts_a_run_on_the_cpu(use_cpu, env, asked, gpus, on_cpu):
    assert read(env, asked, gpus, use_cpu).on_cpu is on_cpu


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (RANK_1_OF_2 | {"ACCELERATE_USE_FSDP": "true"}, ["fsdp_version: 1", "fsdp2.yaml"]),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, ["fsdp_state_dict_type", "SHARDED_STATE_DICT"]),
        (ZERO | {"ACCELERATE_USE_CPU": "True"}, ["ACCELERATE_USE_CPU", "plain DDP", "use_cpu: true"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ["ZeRO stage 0", "ddp.yaml"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "not/here.json"}, ["not/here.json", "launch from"]),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["LOCAL_RANK", "fsdp2.yaml"]),
        ({"WORLD_SIZE": "4", "RANK": "0"}, ["LOCAL_RANK is not set", "SLURM_LOCALID"]),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE=2", "accelerate launch"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM"]),
        (RANK_1_OF_2 | {"LOCAL_WORLD_SIZE": "4"}, ["4 processes", "2 visible GPUs", "num_processes"]),
        (ALONE, ["2 GPUs are visible", "ddp.yaml --num_processes 2", "CUDA_VISIBLE_DEVICES=0"]),
    ],
)
def test_launches_that_cannot_train_are_refused(env, words):
    message = refusal(env)
    assert [word for word in words if word not in message] == []


def test_deepspeed_must_be_installed(monkeypatch):
    monkeypatch.setattr("qwen_vl_sft.distributed.context.find_spec", lambda name: None)
    assert "pip install deepspeed" in refusal(ZERO)


@pytest.mark.parametrize("env", [FSDP2, ZERO])
def test_a_split_model_on_the_cpu_wants_the_gpus_hidden(env):
    assert "CUDA_VISIBLE_DEVICES=-1" in refusal(env, use_cpu=True)
    assert read(env, use_cpu=True, gpus=0).on_cpu


def test_slurm_may_give_each_process_its_own_gpu():
    env = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}
    assert read(env, gpus=1).strategy == "ddp"


# What the launcher was asked for


def asked_by(command: str) -> LauncherRequest:
    asked = read_launcher_request([Process(tuple(command.split()), REPOSITORY)])
    assert asked is not None
    return asked


@pytest.mark.parametrize(
    "start",
    [
        "python /env/bin/accelerate launch",
        "/env/bin/accelerate-launch",
        "python -m accelerate.commands.launch",
        "python -m accelerate.commands.accelerate_cli launch",
        "timeout 60 accelerate launch",
    ],
)
def test_every_way_to_call_the_launcher_is_seen(start):
    asked = asked_by(f"{start} --multi_gpu --num_processes 3 train.py --num_processes 9")
    assert asked == LauncherRequest(
        "accelerate launch (`--num_processes`, `--multi_gpu`)", "MULTI_GPU", 3, on_cpu=False
    )


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_shipped_configurations_are_read_from_the_folder_of_the_launcher(name):
    asked = asked_by(f"accelerate launch --config_file accelerate_configs/{name}.yaml train.py")
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert (asked.kind, asked.processes) == (config["distributed_type"], config["num_processes"])
    assert f"accelerate_configs/{name}.yaml" in asked.source
    assert "mixed_precision" not in config, "the recipe's bf16 decides"
    assert (
        asked_by(f"accelerate launch --config_file accelerate_configs/{name}.yaml --num_processes 7 t.py").processes
        == 7
    )


def test_the_default_configuration_counts_unless_cpu_is_asked_for(monkeypatch, tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("{distributed_type: FSDP, num_processes: 4}")
    monkeypatch.setattr(config_args, "default_config_file", str(default))
    assert asked_by("accelerate launch train.py") == LauncherRequest(
        f"accelerate launch ({default})", "FSDP", 4, on_cpu=False
    )
    assert asked_by("accelerate launch --cpu train.py").kind is None


@pytest.mark.parametrize(
    "commands",
    [
        [],
        ["bash job.sh", "slurmstepd"],
        ["bash -c accelerate"],
        ["python /env/bin/torchrun --nproc_per_node 2 train.py", "accelerate launch --cpu --num_processes 2 sweep.py"],
        ["accelerate launch --config_file gone.yaml train.py"],
        ["accelerate launch --no-such-flag"],
    ],
)
def test_nothing_is_asked_without_a_readable_accelerate_launch_right_above(commands):
    assert read_launcher_request([Process(tuple(command.split()), REPOSITORY) for command in commands]) is None


def test_the_real_ancestors_are_readable():
    assert next(ancestors()).argv
    assert read_launcher_request() is None


@pytest.mark.parametrize(
    ("asked", "env", "words"),
    [
        (
            LauncherRequest("s (`--cpu`)", None, 2, True, cpu_flag=True),
            ALONE,
            ["`--cpu`", "2", "1 process", "cpu.yaml"],
        ),
        (LauncherRequest("s", "FSDP", 2, True, cpu_flag=True), ALONE, ["FSDP", "--cpu"]),
        (LauncherRequest("c.yaml", "MULTI_CPU", 2, False), ALONE, ["c.yaml", "MULTI_CPU", "cpu.yaml"]),
        (LauncherRequest("c.yaml", "NO", 8, False), ALONE, ["c.yaml", "num_processes 8", "ddp.yaml"]),
        (LauncherRequest("s", None, 2, False), ALONE, ["num_processes 2", "1 process"]),
        (LauncherRequest("c.yaml", "DEEPSPEED", 2, False), RANK_1_OF_2, ["DEEPSPEED", "(ddp)", "unset"]),
        (LauncherRequest("c.yaml", "MULTI_GPU", 3, False), RANK_1_OF_2, ["num_processes 3", "2 processes"]),
        (LauncherRequest("c.yaml", "MULTI_XPU", 2, False), RANK_1_OF_2, ["MULTI_XPU", "not supported"]),
    ],
)
def test_a_launch_that_became_something_else_is_refused(asked, env, words):
    message = refusal(env, asked, gpus=0)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("asked", "env"),
    [
        (LauncherRequest("s", None, None, False), ALONE),
        (LauncherRequest("s", None, 2, False), RANK_1_OF_2),
        (LauncherRequest("s (`--cpu`)", None, None, True, cpu_flag=True), ALONE),
        (LauncherRequest("c.yaml", "MULTI_CPU", 1, False), ALONE),
        (LauncherRequest("c.yaml", "NO", 1, False), ALONE),
        (LauncherRequest("c.yaml", "MULTI_GPU", 2, False), RANK_1_OF_2),
        (LauncherRequest("c.yaml", "FSDP", 2, False), FSDP2),
        (LauncherRequest("c.yaml", "DEEPSPEED", 2, False), ZERO),
    ],
)
def test_a_launch_that_is_what_was_asked_passes(asked, env):
    read(env, asked, gpus=0)


def test_one_process_asked_for_takes_one_of_several_gpus():
    assert read(ALONE, LauncherRequest("single_gpu.yaml", "NO", 1, False), gpus=8).strategy == "single"


# What is running


class FakeAccelerator:
    def __init__(self, kind="NO", processes=1, device="cpu"):
        self.distributed_type, self.num_processes, self.device = kind, processes, torch.device(device)


def test_what_runs_is_compared_with_what_was_launched():
    check_running(DistributedContext("single", 1, 0, 0, on_cpu=True), FakeAccelerator(), nn.Linear(1, 1))
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2"):
        with pytest.raises(UserError) as error:
            check_running(DistributedContext(strategy, 2, 0, 0, on_cpu=False), FakeAccelerator(), nn.Linear(1, 1))
        type_, processes, device, wrapper = error.value.problems
        assert f"launched as {strategy}, but accelerate runs NO" in type_
        assert "1 processes take part, not 2" in processes
        assert "the device is cpu, not cuda" in device
        assert "the model is a Linear" in wrapper


def test_data_parallel_is_not_single():
    with pytest.raises(UserError, match="DataParallel"):
        check_running(
            DistributedContext("single", 1, 0, 0, on_cpu=True), FakeAccelerator(), nn.DataParallel(nn.Linear(1, 1))
        )


def test_arguments_of_a_gpu_run_are_left_to_the_recipe():
    assert training_arguments(DistributedContext("fsdp2", 2, 0, 0, on_cpu=False)) == {
        "accelerator_config": {"non_blocking": True}
    }
    assert training_arguments(DistributedContext("ddp", 2, 0, 0, on_cpu=True))["use_cpu"]


# Launches: what is refused in new processes, and with all tests the first configuration too; the others in forked ones


def launch(folder: Path, *arguments: str, new: bool = True) -> tuple[int, str]:
    """Exit code and output of `accelerate launch ARGUMENTS launched_world.py FOLDER`; no process of it is left."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port()), *arguments]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    env |= {"PYTHONPATH": str(REPOSITORY / "src"), "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    if new:
        # A default configuration of this machine's user must not count either.
        env |= {"HF_HOME": str(folder)}
    # A file, not a pipe: a worker that outlives its launcher would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        command += [str(REPOSITORY / "tests" / "fixtures" / "launched_world.py"), str(folder)]
        process = Popen(command, cwd=REPOSITORY, env=env, stdout=output, stderr=output)
        try:
            process.wait(timeout=PROCESS_TIMEOUT)
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
        output.seek(0)
        return process.returncode, output.read()


@pytest.mark.parametrize(
    ("name", "strategy", "wrapper", "new"),
    [
        ("cpu", "ddp", "DistributedDataParallel", False),
        pytest.param("cpu", "ddp", "DistributedDataParallel", True, marks=pytest.mark.long),
        ("ddp", "ddp", "DistributedDataParallel", False),
        pytest.param("zero1", "zero1", "DeepSpeedEngine", False, marks=pytest.mark.long),
        pytest.param("zero2", "zero2", "DeepSpeedEngine", False, marks=pytest.mark.long),
        ("zero3", "zero3", "DeepSpeedEngine", False),
        ("fsdp2", "fsdp2", "FSDPQwen2VLForConditionalGeneration", False),
    ],
)
def test_a_shipped_configuration_runs_what_it_says_on_the_cpu(name, strategy, wrapper, new, tmp_path):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    code, output = launch(tmp_path, "--config_file", f"accelerate_configs/{name}.yaml", new=new)
    assert code == 0, output
    worlds = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("world-*.json"))]
    assert [context["rank"] for context in worlds] == [0, 1], output
    for context in worlds:
        assert (context["strategy"], context["processes"], context["on_cpu"]) == (strategy, 2, True)
        assert context["wrapper"] == wrapper
        before, training = context["waits"]
        assert (set(before), set(training)) == ({24 * 3600}, {77})
        if strategy == "fsdp2":
            assert {"FSDPQwen2VLDecoderLayer", "FSDPQwen2VLVisionBlock"} <= set(context["split"])


@pytest.mark.parametrize("way", ["--cpu", "MULTI_CPU"])
def test_a_group_on_the_cpu_that_became_one_process_is_refused(way, tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    config.write_text("{distributed_type: MULTI_CPU, num_processes: 2}")
    arguments = ("--cpu", "--num_processes", "2") if way == "--cpu" else ("--config_file", str(config))
    code, output = launch(tmp_path, *arguments)
    assert code != 0
    assert "returned non-zero exit status 2" in output  # the worker's, which the launcher turns into 1
    assert f"single process for {way}" in output
    assert "accelerate_configs/cpu.yaml" in output


def test_a_finished_process_of_several_does_what_was_left_for_its_exit_and_no_more(tmp_path):
    """Taking libraries down after that has aborted runs that were finished: here a thread that is still at work."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys, threading, time\n"
        "from qwen_vl_sft.errors import exits_with_user_errors\n"
        "@exits_with_user_errors\n"
        "def main():\n"
        "    atexit.register(lambda: print('registered', flush=True))\n"
        "    threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        "    print('done')\n"
        "main()\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    finished = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "done\nregistered\n", "")
