"""Weights in the precision that an optimizer steps on, where the model computes with rounded copies of them."""

from __future__ import annotations

import torch
from torch import nn


def held_by_deepspeed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the float32 copies that DeepSpeed steps on of what trains in less, by name. All processes must call at once.

    The model itself holds them rounded to bfloat16, and so would a file of it, other than that of DDP.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    held = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            whole = safe_get_full_fp32_param(parameter)
            if whole is not None:
                held[name] = whole.detach().cpu()
    return held
