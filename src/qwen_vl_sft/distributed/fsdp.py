"""Check that FSDP2 has split a model, and that the weights it gathers are bit for bit those that were split."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def problems(model: nn.Module) -> list[str]:
    """Return the problem of a model sharded by FSDP2; call it on all processes, since weights are gathered."""
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
    """Return the weights whose local shard, once gathered, is not bit for bit what this process put in.

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
    """Return this process's part of a whole weight; FSDP2 splits into chunks, of which the last may be missing."""
    own = gathered.detach()
    for axis, placement in enumerate(split.placements):
        if placement.is_shard():
            chunks = own.chunk(split.device_mesh.size(axis), dim=placement.dim)
            rank = split.device_mesh.get_local_rank(axis)
            own = chunks[rank] if rank < len(chunks) else own[:0]
    return own


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().reshape(-1).view(torch.uint8)
