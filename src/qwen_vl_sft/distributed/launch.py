"""Start what was launched: read it first, set it up, and check that it is what trains.

Accelerate turns several requests into something else without a word, mostly on a CPU. So the order in a script is
`read_context`, `start`, `join`, `SFTConfig(..., **training_arguments(world))`, `check_running` and `limit_waits` when
training begins.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d

from qwen_vl_sft.compat.for_accelerate import run_fsdp_on_cpu
from qwen_vl_sft.compat.for_deepspeed import compile_no_shared_memory_reduce
from qwen_vl_sft.distributed import fsdp
from qwen_vl_sft.distributed.context import DEEPSPEED_FILE, DistributedContext, deepspeed_file
from qwen_vl_sft.errors import raise_all

logger = logging.getLogger(__name__)

# One process may be long at downloading, checking images or answering, while the others wait for it.
LONGEST_WAIT = timedelta(days=1)
# accelerate's DistributedType for each strategy; on a CPU a group of plain processes is MULTI_CPU.
RUNNING_TYPES = {"single": {"NO"}, "ddp": {"MULTI_GPU", "MULTI_CPU"}, "fsdp2": {"FSDP"}}
WAY_OUT = (
    "The training that would follow is not the one asked for. Launch with an unchanged file of accelerate_configs/ and "
    "without `fsdp` or `deepspeed` in the recipe; if that does not help, report it with accelerate's and transformers' "
    "versions."
)


def start(context: DistributedContext) -> None:
    """Set up accelerate's state so that the strategy runs as read; call it before `SFTConfig` is built."""
    precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        # Otherwise it would take effect exactly where the recipe says `bf16: false`.
        logger.warning("The launcher's mixed_precision: %s is ignored; the recipe's `bf16` decides.", precision)
    if context.strategy == "single" and not context.on_cpu:
        # With more than one GPU in sight, Trainer would wrap the model in nn.DataParallel.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if os.environ.get(DEEPSPEED_FILE, "none") != "none":
        os.environ[DEEPSPEED_FILE] = str(deepspeed_file(os.environ[DEEPSPEED_FILE]))
    if context.on_cpu:
        # Whatever imports DeepSpeed then need not look for a GPU, and warn that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if context.on_cpu and context.zero_stage:
        compile_no_shared_memory_reduce()
    if context.on_cpu and context.strategy == "fsdp2":
        run_fsdp_on_cpu(join(context))


def join(context: DistributedContext, backend: str | None = None) -> Any:
    """Join the process group; returns accelerate's `PartialState`. Once joined, the same state comes back.

    Whoever starts the group decides how long its processes wait for each other: by themselves 10 minutes with NCCL,
    whatever `ddp_timeout` says. Until `limit_waits` it is `LONGEST_WAIT`. `backend`: `ddp_backend`.
    """
    from accelerate import PartialState

    options = {"timeout": LONGEST_WAIT, **({"backend": backend} if backend else {})} if context.processes > 1 else {}
    # Told of a CPU, accelerate would not let DeepSpeed start the group.
    return PartialState(cpu=context.on_cpu and not context.zero_stage, **options)


def from_first(context: DistributedContext, value: Any) -> Any:
    """Return the first process's `value` on all of them; the others' values are ignored.

    Call it on all processes, joined (`join`). accelerate's own broadcast does nothing, and says nothing, as long as it
    takes the run for a single process.
    """
    if context.processes == 1:
        return value
    assert torch.distributed.is_initialized(), "join the processes before one sends the others something"
    sent = [value if context.rank == 0 else None]
    torch.distributed.broadcast_object_list(sent)
    return sent[0]


def limit_waits(seconds: float) -> None:
    """Set the timeout after which a waiting collective ends the run; call it when training begins.

    All groups are limited, also those that DeepSpeed or FSDP made with limits of the library.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def training_arguments(context: DistributedContext) -> dict[str, Any]:
    """Return the keyword arguments of `SFTConfig` for this launch; they win over the recipe's."""
    if not context.on_cpu:
        # Copying the next batch to the GPU need not wait for what the GPU still computes.
        return {"accelerator_config": {"non_blocking": True}}
    arguments: dict[str, Any] = {"use_cpu": True, "dataloader_pin_memory": False}
    if context.strategy == "fsdp2":
        # Without it TrainingArguments discards the state that `start` prepared.
        arguments["accelerator_config"] = {"use_configured_state": True}
    return arguments


def check_running(context: DistributedContext, accelerator: Any, model: nn.Module) -> None:
    """Raise `UserError` unless `model`, as the trainer wrapped it (`trainer.model_wrapped`), runs as `world` says.

    Call it when training begins: before that nothing is wrapped. `accelerator` is the trainer's.
    """
    running = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    expected = RUNNING_TYPES.get(context.strategy, {"DEEPSPEED"})
    device = "cpu" if context.on_cpu else "cuda"
    problems = []
    if running not in expected:
        problems.append(f"accelerate runs {running}, not {' or '.join(sorted(expected))}")
    if accelerator.num_processes != context.processes:
        problems.append(f"{accelerator.num_processes} processes take part, not {context.processes}")
    if accelerator.device.type != device:
        problems.append(f"the device is {accelerator.device}, not {device}")
    problems += _wrapping_problems(context, model)
    raise_all([f"launched as {context.strategy}, but {problem}. {WAY_OUT}" for problem in problems])


def _wrapping_problems(context: DistributedContext, model: nn.Module) -> list[str]:
    if context.zero_stage:
        return _zero_problems(context, model)
    if context.strategy == "fsdp2":
        return fsdp.problems(model)
    if context.strategy == "ddp" and not isinstance(model, nn.parallel.DistributedDataParallel):
        return [f"the model is a {type(model).__name__}, not wrapped in DistributedDataParallel: nothing is averaged"]
    if context.strategy == "single" and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return [f"the model is wrapped in {type(model).__name__}"]
    return []


def _zero_problems(context: DistributedContext, model: nn.Module) -> list[str]:
    stage_of = getattr(model, "zero_optimization_stage", None)
    if stage_of is None:
        return [f"the model is a {type(model).__name__}, not a DeepSpeed engine"]
    if stage_of() != context.zero_stage:
        return [f"DeepSpeed runs stage {stage_of()}"]
    if context.zero_stage == 3 and context.processes > 1:
        # A split weight keeps its full size in ds_numel and is empty between uses.
        split = [p for p in model.parameters() if getattr(p, "ds_numel", 0) > p.numel()]
        if not split:
            return ["no weight is split over the processes"]
    return []
