"""Command-line options of the check, and the folder that a job will write to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import any_recipe_key, names, option, recipe_values
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed.ports import UNASSIGNED
from qwen_vl_sft.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Command-line options of the check; other words are those of the job, and only its output_dir is read."""

    recipe: Path | None = option(None, "the recipe of the job, for its output_dir", metavar="file")
    output_dir: Path | None = option(None, "folder that all nodes must see; default: the recipe's", metavar="folder")
    nodes: tuple[str, ...] = option((), "nodes of the job, between commas", parse=names, shown="those that answer")
    verdict: Path | None = option(None, "write the verdict into this file", metavar="file")
    seconds: float = option(60.0, "seconds that a node has to answer, and then to add up with the others", at_least=1)
    recipe_keys: dict[str, list[str]] = any_recipe_key()


def output_dir_of(options: PreflightOptions) -> Path | None:
    """Return the job's output_dir; None where neither the command line nor the recipe names one.

    Raises `UserError` for an option, a key or a recipe that the script that trains would refuse.
    """
    of_training = {field.name for field in dataclasses.fields(TrainOptions)} | {"config"}
    words = {name: parts for name, parts in options.recipe_keys.items() if name not in of_training}
    recipe = read_recipe(options.recipe, recipe_values(words, options))
    if options.output_dir is not None:
        return options.output_dir.expanduser()
    return recipe.output_dir if recipe.training.get("output_dir") else None


@dataclass(frozen=True)
class ProcessPlace:
    """A process of the check: its number, that on its node, how many there are, its node, and where they meet."""

    rank: int
    local_rank: int
    processes: int
    node: str
    address: str
    port: int


def place_of(env: Mapping[str, str], hostname: str, nodes: Sequence[str]) -> ProcessPlace:
    """Return the place of a process that srun started, or of one alone."""
    job = int(env.get("SLURM_JOB_ID", os.getpid()))
    return ProcessPlace(
        rank=int(env.get("SLURM_PROCID", 0)),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        # A shell of `salloc` or a batch script has SLURM_NTASKS too, but is in no step of srun.
        processes=int(env.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in env else 1,
        node=env.get("SLURMD_NODENAME") or hostname,
        address=env.get("MASTER_ADDR") or (nodes[0] if nodes else env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"),
        port=int(env.get("MASTER_PORT") or UNASSIGNED[job % len(UNASSIGNED)]),
    )
