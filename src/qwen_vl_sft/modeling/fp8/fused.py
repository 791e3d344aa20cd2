"""Layers that hand quantized values on: a norm quantizes its output, an MLP everything between its products."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.adapters import base_and_adapter
from qwen_vl_sft.modeling.fp8.linear import INPUTS, FP8Linear, Normed
from qwen_vl_sft.modeling.fp8.mlp import SwiGLUProduct, mlp
from qwen_vl_sft.modeling.fp8.weights import Quantized

# The longest row that the norm's kernel takes.
LONGEST_NORM = 8192
# Norms before attention and MLP; others normalise heads, or what the output head reads.
NORMS = ("input_layernorm", "post_attention_layernorm")


def use_fp8_kernels(model: nn.Module, wanted: list[str], kernels: Any) -> dict[str, int]:
    """Put norms and MLPs that hand quantized values on into a base model with FP8 layers; return how many have each.

    Args:
        model: the model, without an adapter.
        wanted: "rms_norm", "mlp" or both.
        kernels: their operations: `CheckedKernels`, or the module `plain`.
    """
    family = family_of(model.config)  # type: ignore[arg-type]
    counts = {"rms_norm": 0, "mlp": 0}
    # Their kernels multiply by the weight as it is.
    norms = "rms_norm" in wanted and "rms_norm" not in family.unfit_kernels and not family.norm_offset
    norms = norms and any(type(module) is FP8Linear for module in model.modules())
    for name, module in model.named_modules():
        part = family.part_of(name)
        if norms and name.endswith(NORMS) and family.fused_layers["rms_norm"].holds(name, part, module):
            if module.weight.numel() > LONGEST_NORM:  # type: ignore[union-attr, operator]
                continue
            module.forward = types.MethodType(_Norm(kernels), module)  # type: ignore[assignment]
            counts["rms_norm"] += 1
        if "mlp" in wanted and family.fused_layers["swiglu"].holds(name, part, module) and _is_fp8_mlp(module):
            module.forward = types.MethodType(_MLP(kernels), module)  # type: ignore[assignment]
            counts["mlp"] += 1
    return {name: count for name, count in counts.items() if name in wanted}


def _is_fp8_mlp(module: Any) -> bool:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    # Layers in blocks quantize their inputs in another way.
    return all(type(layer) is FP8Linear and layer.computation.forward for layer in layers)


def hands_on_fp8(module: nn.Module) -> bool:
    """Return whether a layer was given a forward of `use_fp8_kernels`."""
    return isinstance(getattr(vars(module).get("forward"), "__func__", None), _Fused)


class _Fused:
    """The forward of a layer, called with it: PEFT copies layers that train in full, and the method with them."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels


class _Norm(_Fused):
    """The forward of a norm."""

    def __call__(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = layer.weight
        if weight.requires_grad:
            return type(layer).forward(layer, hidden_states)  # type: ignore[no-any-return]
        normed, values, scales, rstd = NormProduct.apply(hidden_states, weight, layer.variance_epsilon, self.kernels)
        rows = hidden_states.detach().reshape(-1, hidden_states.shape[-1]).contiguous()
        INPUTS.keep(normed, Quantized(values, scales), Normed(rows, rstd, weight.detach()))
        return normed  # type: ignore[no-any-return]


class NormProduct(torch.autograd.Function):
    """A norm with a frozen weight, its output's quantized form, and 1 / the root mean square of its input's rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Any) -> Any:
        """Normalise `x` [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        normed, quantized, rstd = kernels.rms_norm(rows, weight, epsilon)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.shape, ctx.kernels = x.shape, kernels
        # Autograd would write zeros for the others.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*quantized, rstd)
        return normed.view(x.shape), *quantized, rstd

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        if grads[0] is None:
            return (None,) * 4
        rows, weight, rstd = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape).contiguous()
        return ctx.kernels.rms_norm_backward(grad, rows, weight, rstd).view(ctx.shape), None, None, None


class _MLP(_Fused):
    """The forward of an MLP."""

    def __call__(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        found = [base_and_adapter(one, hidden_states) for one in (layer.gate_proj, layer.up_proj, layer.down_proj)]
        if None not in found and all(base.computation.backward for base, _ in found):  # type: ignore[misc]
            return mlp(hidden_states, found, self.kernels)  # type: ignore[arg-type]
        gate, up = layer.gate_proj(hidden_states), layer.up_proj(hidden_states)
        activated, values, scales = SwiGLUProduct.apply(gate, up, self.kernels)
        INPUTS.keep(activated, Quantized(values, scales))
        return layer.down_proj(activated)  # type: ignore[no-any-return]
