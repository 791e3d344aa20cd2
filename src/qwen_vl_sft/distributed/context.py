"""Read from the environment what was launched, and refuse launches that are not what they seem."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch

from qwen_vl_sft.distributed.launcher_request import LauncherRequest, read_launcher_request
from qwen_vl_sft.distributed.slurm import unlike_allotted
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.shipped_files import LAUNCH_CONFIGS, find_file

logger = logging.getLogger(__name__)

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
KINDS: dict[str, str] = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}  # every zero stage: DEEPSPEED
ACCELERATE_DEFAULT_STAGE = "2"
CONFIGS = LAUNCH_CONFIGS
DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


@dataclass(frozen=True)
class DistributedContext:
    """The strategy of this run and the place of this process in it."""

    strategy: Strategy
    processes: int
    rank: int
    local_rank: int
    on_cpu: bool

    @property
    def zero_stage(self) -> int | None:
        """Return DeepSpeed's stage, 1 to 3, or `None` without DeepSpeed."""
        return int(self.strategy.removeprefix("zero")) if self.strategy.startswith("zero") else None


def read_context(
    use_cpu: bool,
    env: Mapping[str, str] = os.environ,
    find_request: Callable[[], LauncherRequest | None] = read_launcher_request,
    count_gpus: Callable[[], int] = torch.cuda.device_count,
) -> DistributedContext:
    """Return the context that the environment describes, without touching a process group or GPU.

    A run is on the CPU when the recipe (`use_cpu`), the launcher or the lack of a visible GPU says so. Raises
    `UserError` for a launch that could not train, and for one that would silently train otherwise than asked.
    """
    _refuse_unsupported(env)
    request = find_request()
    # Counting asks the driver's management library; it creates no CUDA context.
    gpus = count_gpus()
    on_cpu = use_cpu or _is_on(env, "ACCELERATE_USE_CPU") or (request is not None and request.on_cpu) or gpus == 0
    context = DistributedContext(
        strategy=_read_strategy(env),
        processes=int(env.get("WORLD_SIZE", 1)),
        rank=int(env.get("RANK", 0)),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        on_cpu=on_cpu,
    )
    chose_one_process = request is not None and request.processes == 1
    problems = _request_problems(context, request) + _device_problems(context, env, gpus, chose_one_process)
    raise_all(problems + unlike_allotted(context.processes, on_cpu, env))
    if gpus == 0 and not (use_cpu or "CUDA_VISIBLE_DEVICES" in env or (request is not None and request.on_cpu)):
        logger.warning("No GPU is visible: this run is on the CPU.")
    if context.processes == 1 and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        logger.warning("This Slurm step has %s tasks, and each of them trains alone.", env["SLURM_STEP_NUM_TASKS"])
    return context


def _is_on(env: Mapping[str, str], key: str) -> bool:
    return env.get(key, "false").lower() in {"1", "true", "yes", "y", "on", "t"}


def _refuse_unsupported(env: Mapping[str, str]) -> None:
    """Raise for what accelerate offers and this package does not, and for an incomplete environment."""
    problems = [
        f"{key}={env[key]}: {name} is not supported here. Launch with one of the files in {CONFIGS}/."
        for key, name in (
            ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
            ("ACCELERATE_USE_SAGEMAKER", "SageMaker"),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config (tensor, context or sequence parallelism)"),
        )
        if _is_on(env, key)
    ]
    processes = int(env.get("WORLD_SIZE", 1))
    if processes > 1:
        problems += [
            f"WORLD_SIZE={processes} but {key} is not set: accelerate would train {processes} separate models. Set "
            f"{key} (under srun: {key}=${slurm}), or start one `accelerate launch` or `torchrun` on each machine."
            for key, slurm in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"))
            if key not in env
        ]
    for key in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if "WORLD_SIZE" not in env and int(env.get(key, 1)) > 1:
            problems.append(
                f"{key}={env[key]} but WORLD_SIZE is not set: MPI started this process, and accelerate understands MPI "
                "on a CPU only. Start one `accelerate launch` or `torchrun` on each machine instead."
            )
    raise_all(problems)


def _read_strategy(env: Mapping[str, str]) -> Strategy:
    deepspeed, fsdp = _is_on(env, "ACCELERATE_USE_DEEPSPEED"), _is_on(env, "ACCELERATE_USE_FSDP")
    # accelerate tells a distributed run by LOCAL_RANK alone, also one of a single process.
    distributed = "LOCAL_RANK" in env
    if (deepspeed or fsdp) and not distributed:
        key = "ACCELERATE_USE_DEEPSPEED" if deepspeed else "ACCELERATE_USE_FSDP"
        raise UserError(
            f"{key}={env[key]} is set but LOCAL_RANK is not: without a launcher it would have no effect. Start with "
            f"`accelerate launch --config_file {CONFIGS}/{'zero2' if deepspeed else 'fsdp2'}.yaml ...`, or unset it."
        )
    if deepspeed:
        return _read_zero(env)
    if fsdp:
        version = env.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(
                f"fsdp_version: {version} in the accelerate configuration: FSDP1 flattens weights, which breaks frozen "
                f"and 4-bit ones. Use {CONFIGS}/fsdp2.yaml, or set `fsdp_version: 2` under `fsdp_config`."
            )
        if env.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT") != "SHARDED_STATE_DICT":
            # Seen when a 4-bit run is resumed: `KeyError: '...base_layer.weight.absmax'` in torch's set_model_state_dict.
            raise UserError(
                f"fsdp_state_dict_type: {env['FSDP_STATE_DICT_TYPE']} in the accelerate configuration: checkpoints of a "
                "4-bit model could not be resumed. Set it to SHARDED_STATE_DICT; the final adapter or model is saved "
                "whole in any case."
            )
        return "fsdp2"
    return "ddp" if distributed else "single"


def deepspeed_file(path: str) -> Path:
    """Return the DeepSpeed JSON that an accelerate configuration names, also the shipped one from another folder.

    The shipped configurations name theirs `accelerate_configs/zero2.json`, which accelerate reads from the folder that
    the run was launched from.
    """
    return find_file(path, CONFIGS) or Path(path)


def _read_zero(env: Mapping[str, str]) -> Strategy:
    if find_spec("deepspeed") is None:
        raise UserError(
            "distributed_type: DEEPSPEED in the accelerate configuration, but DeepSpeed is not installed. "
            f"`pip install deepspeed ninja`, or use {CONFIGS}/fsdp2.yaml, which needs nothing."
        )
    if _is_on(env, "ACCELERATE_USE_CPU"):
        raise UserError(
            "ACCELERATE_USE_CPU is set together with DeepSpeed: accelerate would run plain DDP. "
            "Unset it, and set `use_cpu: true` in the recipe instead."
        )
    path = env.get(DEEPSPEED_FILE, "none")
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", ACCELERATE_DEFAULT_STAGE)
    if path != "none":
        try:
            with open(deepspeed_file(path), encoding="utf-8") as file:
                stage = str(json.load(file).get("zero_optimization", {}).get("stage", 0))
        except (OSError, ValueError) as error:
            raise UserError(
                f"deepspeed_config_file: {path} in the accelerate configuration cannot be read ({error}). A relative "
                f"path starts from the folder that you launch from ({os.getcwd()}): write an absolute path, or a shipped "
                f"one such as {CONFIGS}/zero2.json."
            ) from error
    strategy = f"zero{stage}"
    if strategy not in get_args(Strategy):
        where = path if path != "none" else "zero_stage of the accelerate configuration"
        raise UserError(
            f"ZeRO stage {stage} in {where}: only stages 1, 2 and 3 split anything. For plain data parallelism use "
            f"{CONFIGS}/ddp.yaml."
        )
    return strategy  # type: ignore[return-value]


def _request_problems(context: DistributedContext, request: LauncherRequest | None) -> list[str]:
    """Return what `accelerate launch` was asked for and did not do."""
    if request is None:
        return []
    kind = KINDS.get(context.strategy, "DEEPSPEED")
    got = f"{context.processes} process{'es' if context.processes > 1 else ''} ({context.strategy})"
    if request.kind not in {None, "MULTI_CPU", *KINDS.values(), "DEEPSPEED"}:
        return [
            f"{request.source}: distributed_type {request.kind} is not supported. Use one of the files in {CONFIGS}/."
        ]
    wanted = f"{request.kind or 'any type'}, num_processes {request.processes or 'unset'}"
    same_kind = request.kind in {None, kind} or (request.kind == "MULTI_CPU" and request.processes == 1)
    if same_kind and request.processes in {None, context.processes}:
        return []
    if request.cpu_flag or request.kind == "MULTI_CPU":
        cause = "--cpu" if request.cpu_flag else "MULTI_CPU"
        why = f"accelerate starts a single process for {cause}, whatever num_processes says"
        way_out = f"For several processes on the CPU use `--config_file {CONFIGS}/cpu.yaml` without --cpu"
    elif context.strategy == "single":
        why = "accelerate starts a single process unless the type is MULTI_GPU, DEEPSPEED or FSDP"
        way_out = f"Use {CONFIGS}/ddp.yaml (GPUs) or {CONFIGS}/cpu.yaml, or set num_processes to 1"
    else:
        why = "a wrapper script, or an environment variable set by hand, changed it on the way"
        way_out = "Make num_processes a multiple of num_machines, and unset WORLD_SIZE and ACCELERATE_* in your shell"
    return [f"{request.source} asked for {wanted}, but this run has {got}: {why}. {way_out}."]


def _device_problems(
    context: DistributedContext, env: Mapping[str, str], gpus: int, chose_one_process: bool
) -> list[str]:
    if context.on_cpu:
        if gpus and context.strategy not in {"single", "ddp"}:
            return [
                f"{context.strategy} on the CPU (`use_cpu`) while {gpus} GPUs are visible: DeepSpeed and FSDP would take "
                "the GPUs by themselves. Hide them: put CUDA_VISIBLE_DEVICES=-1 in front of the command."
            ]
        return []
    if context.strategy == "single" and gpus > 1 and not chose_one_process:
        return [
            f"{gpus} GPUs are visible but one process was started, so all but one would idle. For all of them: "
            f"`accelerate launch --config_file {CONFIGS}/ddp.yaml --num_processes {gpus} ...`. For one: put "
            f"CUDA_VISIBLE_DEVICES=0 in front of the command, or launch with {CONFIGS}/single_gpu.yaml."
        ]
    # Only torch's launcher shares one list of visible GPUs among its workers; Slurm may give each its own.
    local = int(env.get("LOCAL_WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in env and local > gpus:
        return [
            f"{local} processes on this machine but {gpus} visible GPUs: two would share one, which NCCL refuses. "
            f"Set num_processes to {gpus} (of each machine), or CUDA_VISIBLE_DEVICES to {local} GPUs."
        ]
    return []
