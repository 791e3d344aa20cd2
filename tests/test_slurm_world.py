"""A world compared with what Slurm allotted, from the environment; test_slurm.py refuses one on a real cluster."""

import pytest

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.launching.slurm import unlike_allotted
from qwen_vl_sft.launching.world import read_world


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
        read_world(True, {"SLURM_JOB_NUM_NODES": "2"}, lambda: None, lambda: 0)
