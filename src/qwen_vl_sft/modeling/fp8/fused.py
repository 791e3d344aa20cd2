"""Layers that hand quantized values on: a norm quantizes its output, an MLP everything between its products."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.linear import INPUTS, FP8Linear, computed_type
from qwen_vl_sft.modeling.fp8.products import product
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
    norms = "rms_norm" in wanted and "rms_norm" not in family.unfit_kernels
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
    return all(isinstance(layer, FP8Linear) and layer.computation.forward for layer in layers)


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
        normed, values, scales = NormProduct.apply(hidden_states, weight, layer.variance_epsilon, self.kernels)
        INPUTS.keep(normed, Quantized(values, scales))
        return normed  # type: ignore[no-any-return]


class NormProduct(torch.autograd.Function):
    """A norm with a frozen weight, and its output's quantized form."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Any) -> Any:
        """Normalise `x` [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        normed, quantized, rstd = kernels.rms_norm(rows, weight, epsilon)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.shape, ctx.kernels = x.shape, kernels
        ctx.mark_non_differentiable(*quantized)
        return normed.view(x.shape), *quantized

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        rows, weight, rstd = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape).contiguous()
        return ctx.kernels.rms_norm_backward(grad, rows, weight, rstd).view(ctx.shape), None, None, None


class _MLP(_Fused):
    """The forward of an MLP."""

    def __call__(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        layers = [layer.gate_proj, layer.up_proj, layer.down_proj]
        plain = all(isinstance(one, FP8Linear) for one in layers)
        if plain and all(one.computation.backward for one in layers):
            quantized = INPUTS.of(hidden_states, layers[0].computation.quantize)
            parts = [part for one in layers for part in (one.values, one.scales, one.bias)]
            return MLPProduct.apply(hidden_states, quantized, self.kernels, layers[0].computation.emulated, *parts)  # type: ignore[no-any-return]
        gate, up = layer.gate_proj(hidden_states), layer.up_proj(hidden_states)
        activated, values, scales = SwiGLUProduct.apply(gate, up, self.kernels)
        INPUTS.keep(activated, Quantized(values, scales))
        return layer.down_proj(activated)  # type: ignore[no-any-return]


class SwiGLUProduct(torch.autograd.Function):
    """silu(gate) * up, and its quantized form."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kernels: Any) -> Any:
        """Compute [..., I]."""
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        kept = torch.empty_like(gate)
        quantized = kernels.swiglu(_rows(gate), _rows(up), _rows(kept))
        ctx.mark_non_differentiable(*quantized)
        return kept, *quantized

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        found = ctx.kernels.swiglu_gradients(_rows(grads[0]), _rows(gate), _rows(up))
        return *(grad.view(gate.shape) for grad in found), None


class MLPProduct(torch.autograd.Function):
    """A whole MLP of frozen layers without an adapter: gate and up are kept, and all else is FP8."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, quantized: Quantized, kernels: Any, emulated: bool, *parts: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute `x` [..., K] -> [..., K]; `parts` are values, scales and bias of gate, up and down."""
        gate_values, gate_scales, gate_bias, up_values, up_scales, up_bias, down_values, down_scales, down_bias = parts
        dtype = computed_type(x)
        gate = product(quantized, gate_values, gate_scales.view(-1), gate_bias, emulated).to(dtype)  # type: ignore[arg-type, union-attr]
        up = product(quantized, up_values, up_scales.view(-1), up_bias, emulated).to(dtype)  # type: ignore[arg-type, union-attr]
        activated = kernels.swiglu(gate, up)
        found = product(activated, down_values, down_scales.view(-1), down_bias, emulated)  # type: ignore[arg-type, union-attr]
        ctx.save_for_backward(gate, up, gate_values, gate_scales, up_values, up_scales, down_values, down_scales)
        ctx.kernels, ctx.emulated, ctx.input = kernels, emulated, (x.shape, x.dtype)
        return found.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        if not ctx.needs_input_grad[0]:
            return (None,) * 13
        gate, up, gate_values, gate_scales, up_values, up_scales, down_values, down_scales = ctx.saved_tensors
        kernels, emulated, (shape, dtype) = ctx.kernels, ctx.emulated, ctx.input
        grad = kernels.quantize_rows(_rows(grads[0]), down_scales.view(-1))
        grad = product(grad, kernels.transpose(down_values), None, None, emulated).to(gate.dtype)
        # Both of one scale a row, so that one product adds up what goes to x.
        both = kernels.swiglu_backward(grad, gate, up, gate_scales.view(-1), up_scales.view(-1))
        del grad
        found = product(both, kernels.transpose(gate_values, up_values), None, None, emulated)
        return found.to(dtype).view(shape), *(None,) * 12


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
