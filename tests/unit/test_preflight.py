"""The check of a job's nodes: verdicts on made-up findings, what is removed from /dev/shm, adapters."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft.diagnosis.machine import Machine
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.preflight import leftovers
from qwen_vl_sft.preflight.leftovers import remove_leftovers
from qwen_vl_sft.preflight.links import adapters
from qwen_vl_sft.preflight.node import Facts, look_at_folders
from qwen_vl_sft.preflight.options import PreflightOptions, output_dir_of, place_of
from qwen_vl_sft.preflight.verdict import (
    AddedUp,
    common_adapters,
    format_page,
    judge_all_reduce,
    judge_nodes,
    judge_sight,
)

GPU = "NVIDIA H100 80GB HBM3"


def facts(node: str, rank: int = 0, **changed) -> Facts:
    """What a process finds where all is well."""
    found = Facts(node, rank, GPU, (), (), 700e12, None, {}, ("models--Qwen--Qwen2-VL-7B-Instruct",))
    return replace(found, **changed)


NODES = ("n1", "n2", "n3")
WELL = [facts(node, rank) for node in NODES for rank in (0, 1)]


def verdict_with(place: int, **changed):
    """The verdict on three nodes of two GPUs, one process of which found something else."""
    found = [*WELL]
    found[place] = replace(found[place], **changed)
    return judge_nodes(found, NODES, 6)


def test_nodes_that_are_well_pass():
    assert judge_nodes(WELL, NODES, 6).line() == "pass"
    assert judge_nodes([facts("alone", device="CPU", product=1e9)], (), 1).line() == "pass"


@pytest.mark.parametrize(
    ("place", "changed", "node", "told"),
    [
        (3, {"faults": ("GPU 1: 60.1 of 79.1 GiB are taken",)}, "n2", "GPU 1: 60.1 of 79.1 GiB are taken"),
        (5, {"product": 300e12}, "n3", f"GPU 1 ({GPU}): 300 TFLOP/s, where the others reach 700"),
        (2, {"refused": {"HF_HOME": "/hf cannot be written: No such file or directory"}}, "n2", "it can on n1"),
        (0, {"refused": {"output_dir": "/o cannot be written: Read-only"}}, "n1", "Read-only; it can on n2"),
        (
            4,
            {"cached": ()},
            "n3",
            "HF_HOME: shows no models or data, where n1 shows models--Qwen--Qwen2-VL-7B-Instruct",
        ),
    ],
    ids=["memory", "speed", "HF_HOME", "output_dir", "cache"],
)
def test_a_node_that_differs_is_left_out(place, changed, node, told):
    verdict = verdict_with(place, **changed)
    assert verdict.line() == f"exclude {node}"
    assert told in verdict.faults[node][0]
    page = format_page(WELL, verdict, None)
    assert page.startswith("preflight   2 of 3 nodes are well; 6 x")
    assert f"! {node}: " in page


def test_what_no_node_can_do_is_no_fault_of_one():
    readonly = {"refused": {"HF_HOME": "/hf cannot be written: Read-only file system"}}
    assert judge_nodes([replace(one, **readonly) for one in WELL], NODES, 6).line() == "pass"
    nowhere = {"refused": {"output_dir": "/o cannot be written: Permission denied"}}
    verdict = judge_nodes([replace(one, **nowhere) for one in WELL], NODES, 6)
    assert verdict.line() == "fail"
    assert verdict.failures == ["output_dir: /o cannot be written: Permission denied, on any node; name another folder"]


def test_gpus_of_another_kind_and_cpus_are_not_compared():
    assert verdict_with(5, product=100e12, device="NVIDIA L4").line() == "pass"
    cpus = [facts("n1", device="CPU", product=9e9), facts("n2", device="CPU", product=1e9)]
    assert judge_nodes(cpus, ("n1", "n2"), 2).line() == "pass"


def test_processes_that_do_not_answer_are_told_by_their_node():
    verdict = judge_nodes(WELL[:5], NODES, 6)
    assert (verdict.line(), verdict.faults["n3"]) == ("exclude n3", ["1 of its 2 processes answered"])
    verdict = judge_nodes(WELL[:2], NODES, 6)
    assert verdict.line() == "exclude n2,n3"
    assert judge_nodes(WELL[:2], (), 6).line() == "fail"  # nobody knows where the others are


def test_a_folder_that_is_not_shared_and_an_all_reduce_that_fails():
    verdict = judge_nodes(WELL, NODES, 6)
    judge_sight(WELL, {2: True, 4: False}, "/scratch/run", verdict)
    assert verdict.line() == "exclude n3"
    assert verdict.faults["n3"] == [
        "output_dir: what n1 writes to /scratch/run is not seen; it must be on shared storage"
    ]
    verdict = judge_nodes(WELL, NODES, 6)
    judge_all_reduce(WELL, AddedUp(failed={2: "no socket interface found"}), verdict)
    assert (verdict.line(), verdict.faults) == ("exclude n2", {"n2": ["all-reduce: no socket interface found"]})
    verdict = judge_nodes(WELL, NODES, 6)
    judge_all_reduce(WELL, AddedUp(), verdict)
    assert verdict.line() == "fail"
    assert "NCCL_DEBUG=INFO" in format_page(WELL, verdict, AddedUp())
    verdict = judge_nodes(WELL, NODES, 6)
    judge_all_reduce(WELL, AddedUp(bandwidth=180e9), verdict)
    assert verdict.line() == "pass"
    assert "all-reduce over 6 processes: 180.00 GB/s" in format_page(WELL, verdict, AddedUp(bandwidth=180e9))


def test_the_fastest_ports_are_named_where_there_are_slower_ones(tmp_path):
    def port(name, rate, state="4: ACTIVE", layer="InfiniBand"):
        folder = tmp_path / name / "ports/1"
        folder.mkdir(parents=True)
        (folder / "rate").write_text(f"{rate} Gb/sec (4X NDR)\n")
        (folder / "state").write_text(f"{state}\n")
        (folder / "link_layer").write_text(f"{layer}\n")

    assert adapters(tmp_path / "none") is None
    port("mlx5_0", 400)
    port("mlx5_1", 400)
    port("mlx5_2", 400, state="1: DOWN")
    assert adapters(tmp_path) is None  # NCCL takes both by itself
    port("mlx5_bond_0", 25, layer="Ethernet")
    assert adapters(tmp_path) == "=mlx5_0:1,mlx5_1:1"
    assert common_adapters([facts("n1", adapters="=a:1"), facts("n2", adapters="=a:1")]) == "=a:1"
    assert common_adapters([facts("n1", adapters="=a:1"), facts("n2", adapters="=b:1")]) is None


def test_only_what_ended_processes_have_left_is_removed(tmp_path, monkeypatch):
    shared, processes = tmp_path / "shm", tmp_path / "proc"
    shared.mkdir()

    def process(number, lines=(), command="python"):
        folder = processes / str(number)
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text(f"{command}\n")
        (folder / "status").write_text(f"Name:\t{command}\nUid:\t{os.getuid()}\t0\t0\t0\n")
        (folder / "maps").write_text("".join(f"7f00-7f01 rw-s 00000000 00:01 9 {line}\n" for line in lines))
        return folder

    def left(name, age=3600.0):
        (shared / name).write_bytes(b"x" * 4096)
        os.utime(shared / name, (time.time() - age,) * 2)
        return shared / name

    process(10, [f"{shared}/nccl-usedAB (deleted)"])
    (process(11) / "fd/4").symlink_to(shared / "psm_open1234")
    names = ["torch_999_1_0", "nccl-aBcDeF", "psm_12345678", "sem.mp-abcd1234"]
    kept = ["torch_10_5_0", "nccl-usedAB", "psm_open1234", "mine.dat", "torch_notes.txt"]
    for name in (*names, *kept):
        left(name)
    monkeypatch.setattr(leftovers, "_changed", lambda found: found.st_mtime)  # when a test wrote it cannot be set
    young = left("torch_998_1_0", age=10.0)
    namespace = processes / "self/ns"
    namespace.mkdir(parents=True)
    (namespace / "pid").symlink_to("pid:[4026532000]")
    assert remove_leftovers(shared, processes) == (0, 0)  # a container that sees its own processes alone
    (namespace / "pid").unlink()
    (namespace / "pid").symlink_to("pid:[4026531836]")
    hidden = process(12)
    (hidden / "maps").unlink()
    (hidden / "maps").symlink_to(tmp_path / "gone/maps")
    assert remove_leftovers(shared, processes) == (4, 4 * 4096)
    assert {path.name for path in shared.iterdir()} == {*kept, young.name}


def test_nothing_is_removed_where_a_process_that_computes_hides(tmp_path, monkeypatch):
    def hides(process, folder):
        raise PermissionError

    monkeypatch.setattr(leftovers, "_files_of", hides)
    process = tmp_path / "12"
    process.mkdir()
    (process / "status").write_text(f"Uid:\t{os.getuid()}\n")
    (process / "comm").write_text("ssh-agent\n")
    assert leftovers._used_files(tmp_path, tmp_path) == set()
    (process / "comm").write_text("pt_data_worker\n")
    assert leftovers._used_files(tmp_path, tmp_path) is None


def test_folders_of_a_node(tmp_path):
    hub = tmp_path / "hf"
    (hub / "hub/models--a--b").mkdir(parents=True)
    (hub / "hub/version.txt").touch()
    refuse = {"refusal_to_write": lambda folder: "Read-only file system" if folder == hub else None}
    machine = Machine(environment={"HF_HOME": str(hub)}, **refuse)
    assert look_at_folders(tmp_path, machine) == (
        {"HF_HOME": f"{hub} cannot be written: Read-only file system"},
        ("models--a--b",),
    )


def test_the_folder_of_the_run_is_that_of_the_job(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: ~/runs/x\nmax_steps: 3\n")
    assert output_dir_of(PreflightOptions(recipe=recipe)) == Path.home() / "runs/x"
    assert output_dir_of(PreflightOptions(recipe=recipe, output_dir=Path("y"))) == Path("y")
    words = {"dry_run": [], "learning_rate": ["1e-4"]}
    assert output_dir_of(PreflightOptions(recipe=recipe, recipe_keys=words)) == Path.home() / "runs/x"
    assert output_dir_of(PreflightOptions()) is None


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("output_dir: [x\n", {}, "is not valid YAML"),
        (None, {}, r"recipe .*r.yaml does not exist"),
        ("max_steps: 3\n", {"verdct": ["x"]}, "unknown option --verdct; did you mean --verdict"),
        ("max_steps: 3\n", {"learning_rat": ["1"]}, "unknown key learning_rat; did you mean learning_rate"),
        ("max_stps: 3\n", {}, "unknown key max_stps; did you mean max_steps"),
    ],
)
def test_what_the_job_could_not_read_is_told_before_nodes_are_checked(text, words, told, tmp_path):
    recipe = tmp_path / "r.yaml"
    if text is not None:
        recipe.write_text(text)
    with pytest.raises(UserError, match=told):
        output_dir_of(PreflightOptions(recipe=recipe, recipe_keys=words, output_dir=tmp_path))


def test_places_of_processes():
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "41234"}
    place = place_of({**step, "SLURMD_NODENAME": "n2"}, "host", ("n1", "n2"))
    assert (place.rank, place.local_rank, place.processes, place.node) == (3, 1, 4, "n2")
    assert (place.address, place.port) == ("n1", 28466)
    place = place_of({**step, "MASTER_ADDR": "m", "MASTER_PORT": "29500"}, "host", ())
    assert (place.node, place.address, place.port) == ("host", "m", 29500)
    # A shell that salloc has started is in no step.
    alone = place_of({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}, "host", ())
    assert (alone.rank, alone.processes) == (0, 1)


STUBS = {
    # The check finds that a node fails, and writes its verdict as the real one does.
    "srun": """for word in "$@"; do
        [ "$before" != --verdict ] || printf "exclude n2\\n\\n" > "$word"
        before=$word
    done
    exit 1""",
    "scontrol": """echo "$*" >> asked
    case "$*" in
        "show hostnames"*) printf "n1\\nn2\\n" ;;
        "show job"*) echo ExcNodeList=n7 ;;
    esac""",
    "python": "echo 23456",
}


@pytest.mark.parametrize("times", range(4))
def test_nodes_are_left_out_three_times_and_then_the_job_fails(times, tmp_path):
    """The job script itself, with programs of Slurm's names that note what they are asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    before = [f"n{number + 3}" for number in range(times)]
    (tmp_path / "logs/7").mkdir(parents=True)
    (tmp_path / "logs/7/excluded").write_text("".join(f"{node}\n" for node in before))
    slurm = {
        "JOB_ID": "7",
        "JOB_NUM_NODES": "2",
        "JOB_NODELIST": "n[1-2]",
        "CPUS_PER_TASK": "1",
        "RESTART_COUNT": str(times),
    }
    env = {f"SLURM_{name}": value for name, value in slurm.items()} | {"PROCESSES_PER_NODE": "1", "HOME": str(tmp_path)}
    env["PATH"] = f"{programs}:/usr/bin:/bin"
    script = REPOSITORY / "slurm/sft.sbatch"
    ended = subprocess.run(["bash", script, "--lora_r", "8"], cwd=tmp_path, env=env, capture_output=True, text=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    excluded = (tmp_path / "logs/7/excluded").read_text().split()
    if times < 3:
        assert (ended.returncode, excluded) == (0, [*before, "n2"]), ended.stderr
        assert "left out: n2" in ended.stdout
        assert asked[-3:] == ["requeuehold 7", "update JobId=7 ExcNodeList=n7,n2", "release 7"]
    else:
        assert (ended.returncode, excluded) == (1, before)
        assert "nodes were left out three times, and again some fail: n2" in ended.stderr
        assert not any("requeue" in words for words in asked)
