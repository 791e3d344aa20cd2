"""Fused kernels in place of chains of small operations, each on its own switch. CUDA only.

liger-kernel's own patch of Qwen2-VL does not import with transformers 5.23 (it looks for an output class that is gone,
https://github.com/linkedin/Liger-Kernel), so its single kernels are put in here. May go when that patch imports.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.model import part_of

KERNELS = {
    "rms_norm": "normalisation in the language model",
    "swiglu": "activation in the language model",
    "rope": "rotary embedding in the language model and the vision tower",
    "quick_gelu": "activation in the vision tower",
}
SILU = ("SiLU", "SiLUActivation")
TEXT_ROPE, VISION_ROPE = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"


def problems_of_kernels(wanted: list[str], on_cpu: bool) -> Iterator[str]:
    """Why these kernels cannot be used; nothing when they can."""
    unknown = [name for name in wanted if name not in KERNELS]
    if unknown:
        yield f"fused_kernels: {', '.join(unknown)} is unknown; known are {', '.join(KERNELS)}"
    elif wanted and on_cpu:
        yield "fused_kernels run on CUDA only; leave the key out on a CPU"
    elif wanted and importlib.util.find_spec("liger_kernel") is None:
        yield "fused_kernels need liger-kernel; pip install 'qwen_vl_sft[kernels]', or leave the key out"


def use_fused_kernels(model: nn.Module, wanted: list[str]) -> dict[str, int]:
    """Put the kernels into the model; returns of each how many layers (or functions) have it now."""
    counts = dict.fromkeys(wanted, 0)
    for name, module in model.named_modules():
        kind = type(module).__name__
        language = part_of(name) == "language"
        if "rms_norm" in wanted and language and kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
            counts["rms_norm"] += 1
        elif "swiglu" in wanted and language and kind.endswith("MLP") and type(module.act_fn).__name__ in SILU:
            module.forward = types.MethodType(_swiglu, module)
            counts["swiglu"] += 1
        elif "quick_gelu" in wanted and not language and kind == "QuickGELUActivation":
            module.forward = _quick_gelu()
            counts["quick_gelu"] += 1
    if "rope" in wanted:
        counts["rope"] = _use_fused_rope(sys.modules[type(model).__module__])
    return counts


def _rms_norm(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama": computed in float32 and rounded before the weight is multiplied, as transformers does. Not in place: the
    # gradient that comes in is also that of the residual.
    return LigerRMSNormFunction.apply(hidden_states, layer.weight, layer.variance_epsilon, 0.0, "llama", False)


def _swiglu(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return layer.down_proj(LigerSiLUMulFunction.apply(layer.gate_proj(hidden_states), layer.up_proj(hidden_states)))


@functools.cache
def _quick_gelu() -> Any:
    # Written out, it reads and writes the widest activations of the tower three times.
    return torch.compile(lambda hidden_states: hidden_states * torch.sigmoid(1.702 * hidden_states), dynamic=True)


def _use_fused_rope(modeling: Any) -> int:
    """Replace the functions that the model's attention layers call; CPU tensors still take the original ones."""
    replacements = {TEXT_ROPE: _text_rope, VISION_ROPE: _vision_rope}
    for name, fused in replacements.items():
        original = getattr(modeling, name)
        if not hasattr(original, "without_kernel"):
            setattr(modeling, name, _on_cuda(fused, original))
    return len(replacements)


def _on_cuda(fused: Any, original: Any) -> Any:
    @functools.wraps(original)
    def choose(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return (fused if query.is_cuda else original)(query, key, cos, sin)

    choose.without_kernel = original  # type: ignore[attr-defined]
    return choose


def _text_rope(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Rotate [B, heads, T, D] by `cos`, `sin` [B, T, D], whose halves are alike also with M-RoPE's sections."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)


def _vision_rope(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Rotate [T, heads, D] by `cos`, `sin` [T, D], in float32."""
    from liger_kernel.ops.rope import LigerRopeFunction

    # It works on [B, heads, T, D] laid out as [B, T, heads, D], which these are after a copy.
    query, key = (tensor.contiguous()[None].transpose(1, 2) for tensor in (query, key))
    rotated = LigerRopeFunction.apply(query, key, cos[None].float(), sin[None].float())
    return tuple(tensor.transpose(1, 2)[0] for tensor in rotated)
