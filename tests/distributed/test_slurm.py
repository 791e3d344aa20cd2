"""slurm/*.sbatch on a real Slurm of two nodes: training, preemption, failure, scancel, evaluation by dependency."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fixtures.processes import launch
from fixtures.repository import REPOSITORY
from fixtures.slurm_cluster import (
    FIRST,
    SECOND,
    Cluster,
    Job,
    is_pending,
    left_processes,
    missing,
    running_cluster,
    shells_of_nodes,
    trainers_of,
)

FILES = ("slurm/sft.sbatch", "slurm/eval.sbatch")
REASON = missing()
# Nodes are checked in the tests of that; it takes some seconds.
UNCHECKED = {"PREFLIGHT": "0"}
CHECKED = {"ACCELERATE_CONFIG": "accelerate_configs/cpu.yaml", "PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
CHECKED |= {"PREFLIGHT_SECONDS": "600"}
ON_CPU = CHECKED | UNCHECKED
# A node of the cluster has more of them than this machine; jobs of the tests may run side by side.
TWO_NODES = ("--nodes=2", "--cpus-per-task=2")
needs_slurm = pytest.mark.skipif(REASON is not None, reason=f"Slurm: {REASON}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # pytest's own folders may be too long for the name of a socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running_cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_project(folder: Path) -> Path:
    """The repository as a user sees it, where jobs may leave their output."""
    for name in ("accelerate_configs", "recipes", "scripts", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def make_stub(folder: Path) -> Path:
    """The same with a script that counts steps in place of training, and one that shows its words in place of evaluating."""
    make_project(folder)
    (folder / "scripts").unlink()
    (folder / "scripts").mkdir()
    shutil.copy(REPOSITORY / "tests/fixtures/slurm_trainer.py", folder / "scripts/sft.py")
    (folder / "scripts/evaluate.py").write_text("import sys, time; print(sys.argv[1:], flush=True); time.sleep(3600)")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    return make_stub(tmp_path)


def steps(number: int, seconds: float = 0.1) -> tuple[str, ...]:
    return ("--output_dir", "run", "--max_steps", str(number), "--seconds", str(seconds))


def wait_until(happened: Callable[[], object], project: Path, timeout: float = 600) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, f"not within {timeout} s; {output(project)}"
        time.sleep(0.1)


def output(project: Path) -> str:
    """What the jobs of a project have printed."""
    return "\n".join(path.read_text() for path in sorted(project.glob("slurm-*.out")))


def exists(project: Path, *paths: str) -> Callable[[], bool]:
    return lambda: all((project / path).exists() for path in paths)


# The files


@pytest.mark.parametrize("file", FILES)
def test_bash_can_read_it(file):
    subprocess.run(["bash", "-n", REPOSITORY / file], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", REPOSITORY / file], check=True)


@needs_slurm
@pytest.mark.parametrize("file", FILES)
def test_slurm_takes_its_options(cluster, file):
    assert "to start at" in cluster.run("sbatch", "--test-only", "--nodes=2", file, cwd=REPOSITORY)


# The world


@needs_slurm
def test_a_model_on_each_node_is_refused(cluster, project):
    command = "srun --nodes 2 --ntasks-per-node 1 python scripts/sft.py --recipe recipes/quickstart.yaml"
    job = cluster.submit("--nodes=2", f"--wrap={command} --output_dir run", cwd=project)
    ended = cluster.wait(job)
    assert (ended.state, ended.exit_code) == ("FAILED", "2:0")
    assert "Slurm allotted 2 nodes: 2 processes, but this run is a world of 1" in output(project)
    assert not (project / "run").exists()


@needs_slurm
def test_gpus_must_be_asked_for(cluster, stub):
    job = cluster.submit("slurm/sft.sbatch", *steps(1), cwd=stub)
    assert cluster.wait(job).exit_code == "2:0"
    assert "--gpus-per-node N" in output(stub)


@needs_slurm
def test_every_configuration_starts_one_world(cluster, stub):
    shown = {"ddp": None, "zero3": "ACCELERATE_USE_DEEPSPEED", "fsdp2": "ACCELERATE_USE_FSDP"}
    jobs = []
    for name in shown:
        words = (*TWO_NODES, "--gpus-per-node=2", "slurm/sft.sbatch", *steps(1), "--output_dir", name)
        env = {"ACCELERATE_CONFIG": f"accelerate_configs/{name}.yaml"} | UNCHECKED
        jobs.append(cluster.submit(*words, cwd=stub, env=env))
    assert [cluster.wait(job).state for job in jobs] == ["COMPLETED"] * len(jobs), output(stub)
    for job, (name, variable) in zip(jobs, shown.items(), strict=True):
        for rank in range(4):
            context = json.loads((stub / name / f"world-{rank}.json").read_text())
            place = [context[key] for key in ("RANK", "WORLD_SIZE", "SLURM_NODEID", "LOCAL_RANK", "resume")]
            assert place == [str(rank), "4", str(rank // 2), str(rank % 2), "latest"]
            assert [key for key in context if key.startswith("ACCELERATE")] == ([variable] if variable else [])
            assert (stub / f"logs/{job}/attempt-0/rank-{rank}.log").read_text() == f"this is process {rank}\n"


# The check of the nodes, and an evaluation beside it: while one job waits to be started again, the other runs


@dataclass(frozen=True)
class Outcome:
    """Two jobs that ran in one folder."""

    folder: Path
    training: str
    trained: Job
    evaluated: Job


@pytest.fixture(scope="module")
def side_by_side(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Train on two nodes, one of which is bad, in a container, and evaluate on one node until the time limit is near.

    In place of the container's runtime stands a program that notes what it was asked to run, and runs it.
    """
    stub = make_stub(tmp_path_factory.mktemp("side_by_side"))
    runtime = stub / "bin/apptainer"
    runtime.parent.mkdir()
    inside = 'while [ "$1" != image.sif ]; do shift; done; exec "${@:2}"'
    runtime.write_text(f'#!/bin/bash\necho "$@" >> {stub}/asked\n{inside}\n')
    runtime.chmod(0o755)
    path = f"{runtime.parent}:{cluster.environment()['PATH']}"
    env = CHECKED | {"HF_HOME": f"{stub}/hub", "CONTAINER": "image.sif", "PATH": path}
    with cluster.bad_node(SECOND, HF_HOME="/proc/nowhere"):
        # The check of the nodes reads options and recipe as training does.
        words = ("--recipe", "recipes/quickstart.yaml", "--output_dir", "run", "--max_steps", "1")
        training = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *words, cwd=stub, env=env)
        evaluation = cluster.submit("slurm/eval.sbatch", "--run", "a b", "--overwrite", cwd=stub, env=ON_CPU)
        wait_until(lambda: "['--run', 'a b', '--overwrite']" in output(stub), stub)
        cluster.run("scancel", "--batch", "--signal=USR1", evaluation)
        wait_until(lambda: cluster.job(training).excluded == SECOND, stub)
        # There is no third node: it would wait for one.
        cluster.run("scontrol", "update", f"JobId={training}", "NumNodes=1", "NumTasks=1")
        wait_until(lambda: "['--run', 'a b', '--resume']" in output(stub), stub)
        evaluated = cluster.job(evaluation)
        cluster.run("scancel", evaluation)
        return Outcome(stub, training, cluster.wait(training), evaluated)


@needs_slurm
def test_a_bad_node_is_named_and_left_out_and_the_job_goes_on_without_it(side_by_side):
    folder, job, ended = side_by_side.folder, side_by_side.training, side_by_side.trained
    told = output(folder)
    assert (ended.state, ended.restarts, ended.excluded) == ("COMPLETED", 1, SECOND), told
    reason = "HF_HOME: /proc/nowhere cannot be written: No such file or directory"
    assert f"! {SECOND}: {reason}; it can on {FIRST}" in told
    assert f"left out: {SECOND}" in told
    assert "1 of 1 nodes are well" in told
    assert "finished" in told
    assert (folder / f"logs/{job}/attempt-1/rank-0.log").read_text() == "this is process 0\n"
    assert json.loads((folder / "run/world-0.json").read_text())["WORLD_SIZE"] == "1"


@needs_slurm
def test_everything_runs_in_the_container_that_is_named(side_by_side):
    folder = side_by_side.folder
    asked = (folder / "asked").read_text().splitlines()
    bound = f"--nv --pwd {folder} --bind {folder}:{folder},{folder}/hub:{folder}/hub image.sif"
    assert all(line.startswith(f"exec {bound} ") for line in asked)
    assert sum("qwen_vl_sft.preflight" in line for line in asked) == 3
    assert sum("run_node" in line for line in asked) == 1


@needs_slurm
def test_an_evaluation_goes_on_and_overwrites_once(side_by_side):
    """It overwrites what is there at its first start alone: the words of both are awaited."""
    assert side_by_side.evaluated.restarts == 1
    assert output(side_by_side.folder).count("['--run', 'a b', '--overwrite']") == 1


# The end of a job


@needs_slurm
def test_a_failure_is_not_queued_again(cluster, stub):
    job = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *steps(100_000), "--fail", "true", cwd=stub, env=ON_CPU)
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    assert "error: no such column" in output(stub)
    assert f"failed with 1, see above and logs/{job}/attempt-0" in output(stub)
    wait_until(lambda: not left_processes(stub), stub)


@needs_slurm
def test_scancel_is_final(cluster, stub):
    job = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *steps(100_000), cwd=stub, env=ON_CPU)
    wait_until(exists(stub, "run/steps-0", "run/steps-1"), stub)
    cluster.run("scancel", job)
    wait_until(lambda: not left_processes(stub), stub)
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert "slurm/sft.sbatch" in output(stub)
    assert "queued again" not in output(stub)


@needs_slurm
def test_a_signal_to_the_nodes_is_a_preemption_and_restarts_are_counted(cluster, stub):
    """As with a grace time, and proctrack/cgroup: only the processes that srun started are signalled."""
    job = cluster.submit(
        *TWO_NODES, "slurm/sft.sbatch", *steps(100_000), cwd=stub, env=ON_CPU | {"MAX_RESTARTS": "0"}
    )  # fmt: skip
    wait_until(exists(stub, "run/steps-0", "run/steps-1"), stub)
    for process in shells_of_nodes(stub):
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: cluster.job(job).restarts, stub)
    assert json.loads((stub / "run/preempted.json").read_text())["signals"] == 1
    assert "queued again: preempted" in output(stub)
    assert cluster.wait(job).state == "FAILED"
    assert "queued again 1 times, more than MAX_RESTARTS=0" in output(stub)


@needs_slurm
def test_a_job_of_higher_priority_takes_the_nodes_and_the_run_goes_on_after_it(cluster, stub):
    words = (*steps(100_000), "--until", "enough")
    job = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *words, cwd=stub, env=ON_CPU)
    wait_until(exists(stub, "run/steps-0", "run/steps-1"), stub)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=stub)
    assert cluster.wait(urgent).state == "COMPLETED"
    (stub / "enough").touch()
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1)
    assert "DUE TO PREEMPTION" in output(stub)
    assert "queued again" not in output(stub)  # Slurm has done it
    assert "finished" in output(stub)


@needs_slurm
def test_without_a_checkpoint_in_time_the_job_is_queued_again_and_a_job_that_may_not_be_is_followed(cluster, stub):
    env = ON_CPU | {"SAVE_SECONDS": "1"}
    job = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *steps(10, seconds=60), cwd=stub, env=env)
    words = ("--no-requeue", "slurm/sft.sbatch", "--output_dir", "other", "--max_steps", "100000", "--seconds", "0.1")
    once = cluster.submit(*TWO_NODES, *words, cwd=stub, env=ON_CPU)
    wait_until(exists(stub, "run/world-0.json", "run/world-1.json", "other/steps-0", "other/steps-1"), stub)
    for number in (job, once):
        cluster.run("scancel", "--batch", "--signal=USR1", number)
    wait_until(lambda: cluster.job(job).restarts, stub)
    cluster.run("scancel", job)
    assert cluster.wait(job).state == "CANCELLED"
    assert "queued again: no checkpoint in 1 s" in output(stub)
    ended = cluster.wait(once)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "75:0", 0), output(stub)
    told = re.search(r"not allowed to be queued again; Submitted batch job (\d+) follows it", output(stub))
    assert told, output(stub)
    # Its nodes and limits are those of the first, and so is the folder of its logs.
    began = f"2 x 1 processes on {FIRST},{SECOND}, restart 1, logs/{once}/attempt-1"
    wait_until(lambda: began in output(stub), stub)
    cluster.run("scancel", told[1])
    assert cluster.wait(told[1]).state == "CANCELLED"


# The real thing

SHORT = (
    "--max_steps", "14", "--save_strategy", "steps", "--save_steps", "4", "--logging_steps", "1", "--eval_strategy", "no",
    "--predict_with_generate", "false", "--load_best_model_at_end", "false",
)  # fmt: skip


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@needs_slurm
def test_preempted_on_two_nodes_the_run_ends_as_without_slurm_and_is_evaluated(cluster, project):
    words = ("--recipe", "recipes/quickstart.yaml", *SHORT, "--output_dir")
    training = cluster.submit(*TWO_NODES, "slurm/sft.sbatch", *words, "run", cwd=project, env=ON_CPU)
    evaluation = cluster.submit(
        f"--dependency=afterok:{training}", "--cpus-per-task=2", "slurm/eval.sbatch", "--run", "run", "--arms", "tuned",
        "--max_samples", "8", cwd=project, env=ON_CPU,
    )  # fmt: skip
    wait_until(exists(project, "run/checkpoint-4/trainer_state.json"), project)
    # However late the signal comes, the run is not over by then.
    trainers = trainers_of(project)
    for trainer in trainers:
        trainer.suspend()
    cluster.run("scancel", "--batch", "--signal=USR1", training)
    wait_until(lambda: all(is_pending(trainer, signal.SIGUSR1) for trainer in trainers), project)
    for trainer in trainers:
        trainer.resume()
    wait_until(lambda: cluster.job(training).restarts, project)
    assert (project / "run/preempted.json").is_file()

    alone = launch("cpu", "scripts/sft.py", *words, project / "alone")
    assert alone.returncode == 0, alone.stderr[-3000:]
    ended = cluster.wait(training)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), output(project)
    assert losses(project / "run") == losses(project / "alone")
    tensors, expected = (load_file(project / run / "adapter_model.safetensors") for run in ("run", "alone"))
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)

    assert cluster.wait(evaluation).state == "COMPLETED", output(project)
    assert json.loads((project / "run/evaluation/summary.json").read_text())["rows"] == 8
