"""Changes to accelerate."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from qwen_vl_sft.compat.registry import Patch, source_of


def run_fsdp_on_cpu(state: Any) -> None:
    """Have accelerate wrap the model in FSDP on CPUs too; call it before `AcceleratorState` is made.

    `state` is the joined `PartialState`. AcceleratorState turns on FSDP only for MULTI_GPU and its like: with MULTI_CPU
    the plugin is built and the model is wrapped in DDP all the same.
    """
    from accelerate.utils import DistributedType

    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def round_as_one_process_does(accelerator: Any) -> None:
    """Have FSDP2 round nothing but weights; call it before training. `accelerator` is the trainer's.

    accelerate takes `bf16: true` to mean that gradients are added up in bfloat16, and rounds what enters a layer or
    leaves the model as well: the rotation angles of the vision tower keep three digits, and so do log-probabilities.
    Its configuration files cannot say otherwise.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def _fsdp_leaves_out_cpus() -> bool:
    """Return whether the list of types that become FSDP, before that branch, lacks MULTI_CPU."""
    before, branch, _ = source_of("accelerate.state.AcceleratorState.__init__").partition("DistributedType.FSDP\n")
    return bool(branch) and "MULTI_CPU" not in before.rpartition("self.distributed_type in [")[2].partition("]")[0]


def _fsdp_rounds_gradients() -> bool:
    """Return whether the policy for bf16 still reduces gradients in bfloat16, and casts what layers are given."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    policy: Any = plugin.mixed_precision_policy
    return policy.reduce_dtype == torch.bfloat16 or policy.cast_forward_inputs


PATCHES = (
    Patch(
        name="run_fsdp_on_cpu",
        package="accelerate",
        broken="<=1.15",
        without="FSDP2 launched on CPUs trains as plain DDP, without a word.",
        applied_by="compat.for_accelerate.run_fsdp_on_cpu",
        still_needed=_fsdp_leaves_out_cpus,
        links=("https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/state.py",),
        reads={"accelerate.state.PartialState": ("_shared_state", "distributed_type")},
    ),
    Patch(
        name="round_as_one_process_does",
        package="accelerate",
        broken="<=1.15",
        without="With bf16, FSDP2 adds up gradients in bfloat16 and rounds what enters layers and leaves the model.",
        applied_by="compat.for_accelerate.round_as_one_process_does",
        still_needed=_fsdp_rounds_gradients,
        links=("https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py",),
    ),
    Patch(
        name="ignore_the_launchers_precision",
        package="accelerate",
        broken="<=1.15",
        without="mixed_precision of a launch file takes effect where the recipe says `bf16: false`.",
        applied_by="distributed.launch.start",
        still_needed=lambda: "ACCELERATE_MIXED_PRECISION" in source_of("accelerate.state.AcceleratorState"),
    ),
    Patch(
        name="sync_gradients_at_the_end_of_a_packed_step",
        package="accelerate",
        broken="<=1.15",
        kind="extension",
        without="DeepSpeed does not know which micro-batch of a packed step is the last.",
        applied_by="training.trainer.VisionSFTTrainer.training_step",
        relies_on={"accelerate.state.GradientState._set_sync_gradients": ("sync_gradients",)},
    ),
)
