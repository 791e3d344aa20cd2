"""A real Slurm of two nodes on this machine, for test_slurm.py: every daemon runs as the user of the tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
PACKAGES = "munge slurmctld slurmd slurm-client"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CPUS = 8
# The first node is named after this machine, so that its name resolves here; the second is never looked up.
FIRST = socket.gethostname().partition(".")[0]
SECOND = f"{FIRST}-second"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# A credential is short-lived, or a job that is queued again would wait for it to expire, two minutes.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
OverTimeLimit=0
SchedulerParameters=sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName={first} NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs={cpus} RealMemory=9999 Gres=gpu:4
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs={cpus} RealMemory=9999 Gres=gpu:4
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={first},{second} Default=YES State=UP
PartitionName=urgent Nodes={first},{second} PriorityTier=2 State=UP
"""


@dataclass(frozen=True)
class Job:
    """A job as `scontrol show job` tells it."""

    state: str
    exit_code: str
    restarts: int
    reason: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its commands read `SLURM_CONF`."""

    folder: Path

    def run(self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a Slurm command and return what it prints, on both streams. Raises where it fails."""
        command = [shutil.which(str(words[0]), path=PATH) or str(words[0]), *map(str, words[1:])]
        done = subprocess.run(
            command, cwd=cwd, env=self.environment(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
        )
        output = done.stdout.decode()
        assert done.returncode == 0, f"{command}: {output}"
        return output

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """The environment of the tests without what an outer Slurm or launcher has set."""
        outer = ("SLURM", "SBATCH", "SRUN", "ACCELERATE", "QWEN_VL_SFT")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        return {**kept, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), **(more or {})}

    def submit(self, *words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
        """`sbatch`; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, env=env).strip()

    def job(self, number: str) -> Job:
        """The job now."""
        words = self.run("scontrol", "show", "job", number).split()
        told = dict(word.split("=", 1) for word in words if "=" in word)
        return Job(told["JobState"], told["ExitCode"], int(told["Restarts"]), told["Reason"])

    def wait(self, number: str, timeout: float = 300) -> Job:
        """Wait until a job has ended."""
        end = time.monotonic() + timeout
        while (job := self.job(number)).state not in ENDED:
            assert time.monotonic() < end, f"job {number} is {job} after {timeout} s\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        return "\n".join(f"{file.name}: ...{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.log")))


def missing() -> str | None:
    """Why no cluster can run here, None when one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"no {', '.join(absent)}: apt-get install {PACKAGES}" if absent else None


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in an empty folder; at the end stop its daemons, and whatever its jobs have left."""
    cluster = Cluster(folder)
    _write_configuration(folder)
    try:
        _start_daemons(cluster)
        yield cluster
    finally:
        _stop(folder)


def left_processes(folder: Path) -> list[psutil.Process]:
    """Processes other than this one that name a folder in their command line or environment, or work in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(folder) in word for word in words):
                found.append(process)
    return found


def shells_of_nodes(folder: Path) -> list[psutil.Process]:
    """The two shells that srun started for the nodes of a project's job."""
    shells = []
    for process in left_processes(folder):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if "run_node" in " ".join(process.cmdline()) and parent is not None and "slurmstepd" in parent.name():
                shells.append(process)
    assert len(shells) == 2
    return shells


def _write_configuration(folder: Path) -> None:
    for name in ("state", "munge", FIRST, SECOND):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller_port, first_port, second_port = _free_ports(3)
    text = CONFIGURATION.format(
        folder=folder, user=getpass.getuser(), host=FIRST, first=FIRST, second=SECOND, cpus=CPUS,
        controller_port=controller_port, first_port=first_port, second_port=second_port,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    # Placeholders: Slurm counts them out as GPUs, and nothing opens them.
    for number in range(4):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")


def _start_daemons(cluster: Cluster) -> None:
    munge = cluster.folder / "munge"
    files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
    # Forced, since the folder of a test is for its user alone, where munge wants a socket that all may reach.
    cluster.run("munged", "--force", *files, f"--socket={munge / 'socket'}", "--num-threads=2")
    cluster.run("slurmctld", "-c")
    for node in (FIRST, SECOND):
        cluster.run("slurmd", "-N", node)
    end = time.monotonic() + 30
    idle = ("sinfo", "--noheader", "--Node", "--responding", "--states=idle", "--partition=main")
    while cluster.run(*idle).count("\n") < 2:
        assert time.monotonic() < end, f"the nodes are not idle after 30 s\n{cluster.logs()}"
        time.sleep(0.1)


def _stop(folder: Path) -> None:
    """End the daemons, which forked away from the tests, then everything else that names the folder."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        processes = left_processes(folder)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal_number)
        psutil.wait_procs(processes, timeout=5)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
