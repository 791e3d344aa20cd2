"""FSDP2, held to what one process computes: it rounds nothing but weights, and 4-bit weights arrive bit by bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


def round_as_one_process_does(accelerator: Any) -> None:
    """Have FSDP2 round nothing but weights; call it before training. `accelerator` is the trainer's.

    accelerate takes `bf16: true` to mean that gradients are added up in bfloat16, and what enters a layer or leaves the
    model is rounded to it as well: the vision tower's rotation angles lose all but three digits, and so do
    log-probabilities. Its configuration files cannot say otherwise. May go when accelerate lets its users choose
    `reduce_dtype`, `output_dtype` and `cast_forward_inputs` there
    (FullyShardedDataParallelPlugin.set_mixed_precision).
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


def gather_bytes() -> None:
    """Have FSDP2 gather weights as bytes from now on, in this process.

    4-bit values lie in tensors of floats, since FSDP2 splits no others, and one in a thousand of these looks like NaN. On
    GPUs each process lays its share of a layer out with an operation that makes one NaN of all
    (https://github.com/pytorch/pytorch/issues/159333): QLoRA on more than one GPU trained on other weights than it had
    loaded, by 0.5% of a 7B's first loss (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945). Weights of
    several types are gathered as bytes by FSDP2 itself; here all are. May go when the first of the two is closed in the
    oldest PyTorch that this package runs with; `altered_weights` tells.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    describe = collectives._get_all_gather_input_metadatas
    if describe.__module__ == __name__:
        return  # done before

    def described_as_bytes(param_all_gather_inputs: list[list[torch.Tensor]]) -> tuple[Any, Any, torch.dtype]:
        types, sizes, _ = describe(param_all_gather_inputs)
        return types, sizes, torch.uint8

    collectives._get_all_gather_input_metadatas = described_as_bytes


def prepare_final_save(accelerator: Any) -> None:
    """Have `trainer.save_model` write whole weights; call it on every rank after training, and save no checkpoint then.

    Under FSDP with SHARDED_STATE_DICT, `save_model` writes nothing and says nothing
    (https://github.com/huggingface/transformers/issues/30491). Checkpoints need SHARDED_STATE_DICT for QLoRA to resume.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")


def problems(model: nn.Module) -> list[str]:
    """What is wrong with a model that should be split by FSDP2; call it on all processes, since weights are gathered."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return [f"the model is a {type(model).__name__}, not split by fully_shard"]
    found = []
    if sum(isinstance(module, FSDPModule) for module in model.modules()) < 3:
        found.append("no layer is split on its own, so that the whole model is gathered at once")
    # 8-bit weights and 4-bit ones in integer storage would stay whole; everything that trains must be split.
    whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        found.append(f"{len(whole)} trainable weights are not split, the first of them {whole[0]}")
    altered = altered_weights(model)
    if altered:
        found.append(f"{len(altered)} weights are gathered with other values than they have, the first is {altered[0]}")
    return found


def altered_weights(model: nn.Module) -> list[str]:
    """Names of weights whose own share, once gathered, is not bit for bit what this process put in.

    Weights that are gathered in another type than theirs are left out. One layer at a time is whole meanwhile.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    altered = []
    layers: list[tuple[str, Any]] = [named for named in model.named_modules() if isinstance(named[1], FSDPModule)]
    for prefix, module in layers:
        split = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
        module.unshard()
        for name, gathered in module.named_parameters():
            share = split.get(name)
            # What lies in layers that are split on their own stays as it is until their turn comes.
            if share is None or isinstance(gathered, DTensor) or gathered.dtype != share.dtype:
                continue
            put_in = share.to_local().to(gathered.device)  # with `fsdp_offload_params` shares lie in the CPU's memory
            if not torch.equal(_bytes(_own_share(gathered, share)), _bytes(put_in)):
                altered.append(".".join(filter(None, (prefix, name))))
        module.reshard()
    return altered


def _own_share(gathered: torch.Tensor, split: Any) -> torch.Tensor:
    """The part of a whole weight that this process holds: FSDP2 splits into chunks, of which the last may be missing."""
    own = gathered.detach()
    for axis, placement in enumerate(split.placements):
        if placement.is_shard():
            chunks = own.chunk(split.device_mesh.size(axis), dim=placement.dim)
            rank = split.device_mesh.get_local_rank(axis)
            own = chunks[rank] if rank < len(chunks) else own[:0]
    return own


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)
