"""A world compared with what Slurm allotted, what a job is started with, and the check of its nodes.

test_slurm.py has a real cluster.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.ports import free_port
from fixtures.processes import PROCESS_TIMEOUT, Popen
from fixtures.repository import REPOSITORY
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.distributed.slurm import unlike_allotted
from qwen_vl_sft.errors import UserError


@pytest.mark.parametrize(
    ("processes", "on_cpu", "env"),
    [
        (1, False, {}),
        (1, False, {"SLURM_GPUS_ON_NODE": "8"}),
        (8, False, {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}),
        (8, False, {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "a100:4"}),
        (6, True, {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}),
        (1, False, {"SLURM_JOB_NUM_NODES": "2", "QWEN_VL_SFT_EXPECTED_PROCESSES": "any"}),
        (1, False, {"SLURM_JOB_NUM_NODES": "2", "QWEN_VL_SFT_EXPECTED_PROCESSES": "1"}),
    ],
)
def test_a_world_as_large_as_allotted_passes(processes, on_cpu, env):
    assert unlike_allotted(processes, on_cpu, env) == []


@pytest.mark.parametrize(
    ("processes", "on_cpu", "env", "words"),
    [
        (1, True, {"SLURM_JOB_NUM_NODES": "2"}, "Slurm allotted 2 nodes: 2 processes, but this run is a world of 1"),
        (4, False, {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}, "2 nodes with 4 GPUs each: 8 processes"),
        (2, False, {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_PER_NODE": "4"}, "1 node with 4 GPUs each: 4 processes"),
        (1, True, {"QWEN_VL_SFT_EXPECTED_PROCESSES": "4"}, "QWEN_VL_SFT_EXPECTED_PROCESSES=4: 4 processes"),
        (1, True, {"QWEN_VL_SFT_EXPECTED_PROCESSES": "x"}, "give the number of processes"),
    ],
)
def test_a_smaller_world_is_refused(processes, on_cpu, env, words):
    (problem,) = unlike_allotted(processes, on_cpu, env)
    assert words in problem
    assert "QWEN_VL_SFT_EXPECTED_PROCESSES=" in problem


def test_reading_the_world_refuses_it():
    with pytest.raises(UserError, match="Slurm allotted 2 nodes"):
        read_context(True, {"SLURM_JOB_NUM_NODES": "2"}, lambda: None, lambda: 0)


@pytest.fixture
def words_of_job(tmp_path, monkeypatch):
    """What slurm/sft.sbatch gives to each process, in a job that was queued again so often."""
    what_follows = 'until [ "$1" = node ]; do shift; done; shift; printf "%s\\n" "$@"'
    for name, line in {"srun": what_follows, "scontrol": "echo node1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    context = {"JOB_ID": "1", "JOB_NUM_NODES": "1", "JOB_NODELIST": "node1", "CPUS_PER_TASK": "1", "GPUS_ON_NODE": "1"}
    env = {**os.environ, "PATH": path, "PREFLIGHT": "0", **{f"SLURM_{name}": value for name, value in context.items()}}

    def start(restarts, *words):
        job = ["bash", REPOSITORY / "slurm/sft.sbatch", *words]
        finished = subprocess.run(
            job, cwd=tmp_path, env={**env, "SLURM_RESTART_COUNT": str(restarts)}, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        return [line for line in finished.stdout.splitlines() if not line.startswith("slurm/sft.sbatch, ")]

    return start


@pytest.mark.parametrize(
    "named",
    [
        ("--resume_from_checkpoint", "runs/x y/checkpoint-50"),
        ("--resume_from_checkpoint=runs/x y/checkpoint-50",),
        ("--resume-from-checkpoint", "runs/x y/checkpoint-50"),
    ],
)
@pytest.mark.parametrize("last", [(), ("--log_row_ids",)])
def test_a_named_checkpoint_is_for_the_first_start_alone(named, last, words_of_job):
    recipe, latest = ["--recipe", "a b.yaml"], ["--resume_from_checkpoint", "latest"]
    assert words_of_job(0, *recipe, *named, *last) == [*recipe, *named, *last]
    assert words_of_job(1, *recipe, *named, *last) == [*recipe, *last, *latest]
    assert words_of_job(0, *recipe, *last) == words_of_job(1, *recipe, *last) == [*recipe, *last, *latest]


def test_processes_of_the_check_meet_and_add_up_and_one_that_does_not_come_is_told(tmp_path):
    def start(rank, processes, *words):
        place = {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": f"{processes}"}
        place |= {"SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{ports[processes]}"}
        command = [
            sys.executable,
            "-m",
            "qwen_vl_sft.preflight",
            "--verdict",
            tmp_path / f"verdict-{processes}",
            *words,
        ]
        return Popen(command, env=os.environ | place, stdout=-1, stderr=-1, text=True, cwd=tmp_path)

    ports = {2: free_port(), 3: free_port()}
    both = [start(rank, 2, "--nodes", "n1,n2", "--output_dir", "run") for rank in (1, 0)]
    # The one that answers is there before the first begins to wait for another.
    two_of_three = [start(rank, 3, "--nodes", "n1,n2,n3", "--seconds", limit) for rank, limit in ((1, "600"), (0, "8"))]
    told = [process.communicate(timeout=PROCESS_TIMEOUT) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    page = told[1][0].splitlines()
    assert page[0] == "preflight   2 of 2 nodes are well"
    assert page[1].startswith("            all-reduce over 2 processes: ")
    assert (tmp_path / "verdict-2").read_text() == "pass\n\n"
    assert not (tmp_path / "run").exists()
    told = [process.communicate(timeout=PROCESS_TIMEOUT) for process in two_of_three]
    assert [process.returncode for process in two_of_three] == [0, 1], told
    assert "! n3: 0 of its 1 processes answered" in told[1][0]
    assert (tmp_path / "verdict-3").read_text() == "exclude n3\n\n"
