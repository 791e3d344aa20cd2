"""Changes to accelerate."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


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
