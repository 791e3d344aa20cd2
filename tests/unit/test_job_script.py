"""The job script with stand-ins for Slurm's programs: what it asks of them where a real cluster is not needed."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from fixtures.repository import REPOSITORY

SHOWN = "JobId=7 Command=/home/me/slurm/sft.sbatch Features={features} OverSubscribe={shared} {tres}"
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "qwen",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_GPUS_ON_NODE": "4",
    "PREFLIGHT": "0",
}


def run_script(script, folder, environment, *words, **programs):
    """Run a job script; `programs` are the lines of stand-ins."""
    (folder / "bin").mkdir()
    for name, line in {"python": "echo 29500", **programs}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    return subprocess.run(
        ["bash", REPOSITORY / script, *words],
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **JOB, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def follower(folder, environment, **shown):
    """Return the options of the job that follows one which was preempted and may not be queued again."""
    job = SHOWN.format(**{"features": "(null)", "shared": "OK", "tres": "", **shown})
    done = run_script(
        "slurm/sft.sbatch",
        folder,
        environment,
        *("--recipe", "a b.yaml"),
        scontrol=f"case $1 in show) [ $2 = job ] && echo {shlex.quote(job)} || echo n1;; *) exit 1;; esac",
        squeue="echo 1-00:00:00",
        srun='touch "$LOGS/preempted"',
        sbatch=f'printf "%s\\n" "$@" > {folder}/asked; echo Submitted batch job 8',
    )
    assert done.returncode == 75, done.stderr
    assert "not allowed to be queued again; Submitted batch job 8 follows it" in done.stdout
    words = (folder / "asked").read_text().splitlines()
    assert words[-3:] == ["/home/me/slurm/sft.sbatch", "--recipe", "a b.yaml"]
    return words[:-3]


ALWAYS = ["--nodes=2", "--partition=gpu", "--job-name=qwen", "--time=1-00:00:00", "--cpus-per-task=8"]
ALWAYS += ["--dependency=afternotok:7"]


@pytest.mark.parametrize(
    ("environment", "shown", "options"),
    [
        ({}, {}, ["--gpus-per-node=4"]),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, {"tres": "TresPerNode=gres/gpu:h100:4"}, ["--gpus-per-node=h100:4"]),
        ({}, {"tres": "TresPerNode=gres/gpu:h100:4"}, ["--gres=gpu:h100:4"]),
        ({}, {"tres": "TresPerNode=gres:gpu:4"}, ["--gres=gpu:4"]),
        ({"SLURM_GPUS_ON_NODE": "", "PROCESSES_PER_NODE": "2"}, {}, []),
        (
            {"SLURM_MEM_PER_CPU": "4096", "SLURM_JOB_ACCOUNT": "lab", "SLURM_JOB_RESERVATION": "mine"},
            {"features": "ib&a100", "shared": "NO"},
            [
                "--account=lab",
                "--reservation=mine",
                "--mem-per-cpu=4096",
                "--constraint=ib&a100",
                "--exclusive",
                "--gpus-per-node=4",
            ],
        ),
    ],
    ids=["gpus", "gpus-per-node", "gres with a kind", "gres of older Slurm", "no GPUs", "all else"],
)
def test_a_job_that_follows_asks_for_what_this_one_has(tmp_path, environment, shown, options):
    assert follower(tmp_path, environment, **shown) == [*ALWAYS, *options]


@pytest.mark.parametrize("allowed", [True, False])
def test_an_evaluation_near_its_limit_goes_on_where_it_may_not_be_queued_again(tmp_path, allowed):
    done = run_script(
        "slurm/eval.sbatch",
        tmp_path,
        {},
        *("--run", "run"),
        scontrol=f"[ $1 != show ] || exec echo n1; touch asked; exit {int(not allowed)}",
        # bash loses the exit code of a process that ends in the moment of a signal, so not before it was taken.
        srun="kill -USR1 $PPID; until [ -e asked ]; do sleep 0.01; done",
    )
    assert done.returncode == 0, done.stderr
    assert "queued again: the time limit is near" in done.stdout
    assert ("the same command continues" in done.stderr) is not allowed
    assert "ended with 0" in done.stdout
