"""Command-line options of the check, and the folder that a job will write to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from qwen_vl_sft.config.coercion import load_yaml
from qwen_vl_sft.config.command_line import any_recipe_key, names, option
from qwen_vl_sft.shipped_files import RECIPES, find_file


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
    """Return the job's output_dir; None where neither the command line nor a readable recipe names one.

    What is wrong with a recipe is told by the script that trains on it.
    """
    if options.output_dir is not None:
        return options.output_dir.expanduser()
    path = find_file(options.recipe, RECIPES) if options.recipe is not None else None
    if path is None:
        return None
    try:
        written = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    named = written.get("output_dir") if isinstance(written, dict) else None
    return Path(named).expanduser() if isinstance(named, str) and named else None


@dataclass(frozen=True)
class Place:
    """A process of the check: its number, that on its node, how many there are, its node, and where they meet."""

    rank: int
    local_rank: int
    processes: int
    node: str
    address: str
    port: int


def place_of(env: Mapping[str, str], hostname: str, nodes: Sequence[str]) -> Place:
    """Return the place of a process that srun started, or of one alone."""
    job = int(env.get("SLURM_JOB_ID", os.getpid()))
    return Place(
        rank=int(env.get("SLURM_PROCID", 0)),
        local_rank=int(env.get("SLURM_LOCALID", 0)),
        # A shell of `salloc` or a batch script has SLURM_NTASKS too, but is in no step of srun.
        processes=int(env.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in env else 1,
        node=env.get("SLURMD_NODENAME") or hostname,
        address=env.get("MASTER_ADDR") or (nodes[0] if nodes else env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"),
        port=int(env.get("MASTER_PORT") or 20000 + job % 20000),
    )
