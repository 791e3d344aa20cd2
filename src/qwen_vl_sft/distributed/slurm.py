"""Compare the processes of a run with what Slurm allotted to its job."""

from __future__ import annotations

from collections.abc import Mapping

EXPECTED = "QWEN_VL_SFT_EXPECTED_PROCESSES"
UNCHECKED = "any"


def unlike_allotted(processes: int, on_cpu: bool, env: Mapping[str, str]) -> list[str]:
    """Return why this number of processes is not what the Slurm job was given; empty outside of Slurm.

    `QWEN_VL_SFT_EXPECTED_PROCESSES` says how many there must be, as slurm/sft.sbatch does. Without it, a run on GPUs must
    take all of the job's, and one on the CPU must at least be spread over the job's nodes.
    """
    stated = env.get(EXPECTED)
    if stated == UNCHECKED:
        return []
    if stated is not None:
        if not stated.isdecimal():
            return [f"{EXPECTED}={stated}: give the number of processes, or {UNCHECKED} for no check."]
        if processes == int(stated):
            return []
        wanted, source = int(stated), f"{EXPECTED}={stated}"
    else:
        nodes = _number(env.get("SLURM_JOB_NUM_NODES"))
        gpus = 0 if on_cpu else _number(env.get("SLURM_GPUS_ON_NODE") or env.get("SLURM_GPUS_PER_NODE"))
        wanted = nodes * max(gpus, 1)
        if processes == wanted or (processes > wanted and not gpus) or not nodes:
            return []
        source = f"Slurm allotted {nodes} node{'s' if nodes > 1 else ''}" + (f" with {gpus} GPUs each" if gpus else "")
    several = "each node would train a model of its own" if processes < wanted else "they do not fit"
    return [
        f"{source}: {wanted} processes, but this run is a world of {processes}; {several}. Start it with slurm/sft.sbatch,"
        " or one `accelerate launch` on each node with --num_machines, --num_processes (of all nodes together),"
        " --machine_rank, --main_process_ip and --main_process_port. If this is meant, as when you try something in an"
        f" interactive job, put {EXPECTED}={processes} in front of the command."
    ]


def _number(value: str | None) -> int:
    """Return the count in a Slurm variable such as `4`, `a100:4` or `gpu:a100:4`; 0 for none."""
    count = (value or "").partition("(")[0].rpartition(":")[2]
    return int(count) if count.isdecimal() else 0
