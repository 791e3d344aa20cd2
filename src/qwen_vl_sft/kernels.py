"""Fused kernels of liger-kernel, put one by one into the language model: its own patch of Qwen2-VL does not import here.

liger-kernel 0.8.5 imports a class for it that transformers 5.23 does not have any more
(https://github.com/linkedin/Liger-Kernel). The single kernels do not depend on that. May go when its patch imports.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.model import part_of

KERNELS = ("rms_norm", "swiglu")


def problems_of_kernels(wanted: list[str], on_cpu: bool) -> Iterator[str]:
    """Why these kernels cannot be used; nothing when they can."""
    unknown = [name for name in wanted if name not in KERNELS]
    if unknown:
        yield f"fused_kernels: {', '.join(unknown)} is unknown; known are {', '.join(KERNELS)}"
    elif wanted and on_cpu:
        yield "fused_kernels run on CUDA only; leave the key out on a CPU"
    elif wanted and importlib.util.find_spec("liger_kernel") is None:
        yield "fused_kernels need liger-kernel; pip install 'qwen_vl_sft[kernels]', or leave the key out"


def use_fused_kernels(model: nn.Module, wanted: list[str]) -> int:
    """Replace the forward of the language model's layers that have a fused kernel; returns how many."""
    count = 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        if part_of(name) != "language":
            continue
        if "rms_norm" in wanted and kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
        elif "swiglu" in wanted and kind.endswith("MLP") and isinstance(module.act_fn, nn.SiLU):
            module.forward = types.MethodType(_swiglu, module)
        else:
            continue
        count += 1
    assert count or not wanted, "no layer of the language model has one of these kernels"
    return count


def _rms_norm(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama": computed in float32 and rounded before the weight is multiplied, as transformers does. Not in place: the
    # gradient that comes in is also that of the residual.
    return LigerRMSNormFunction.apply(hidden_states, layer.weight, layer.variance_epsilon, 0.0, "llama", False)


def _swiglu(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return layer.down_proj(LigerSiLUMulFunction.apply(layer.gate_proj(hidden_states), layer.up_proj(hidden_states)))
