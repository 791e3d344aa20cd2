"""FP8 products in the backward pass alone, of a base in 16 bits.

The forward pass is that of the 16-bit base, and so is the loss. Each layer's weight is quantized when the gradient of its
input is computed, and forgotten.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.modeling.fp8.computation import computation_of
from qwen_vl_sft.modeling.fp8.layers import fp8_layers
from qwen_vl_sft.modeling.fp8.linear import Computation, input_gradient


def use_fp8_gradients(model: nn.Module, settings: ModelSettings, on_cpu: bool) -> int:
    """Have the layers that `load_in_fp8` would quantize compute gradients of inputs in FP8; return how many do."""
    layers = fp8_layers(model, settings)
    forward = _Forward(computation_of(settings, on_cpu))
    for layer in layers.values():
        layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign, assignment]
    return len(layers)


class _Forward:
    """The forward of a linear layer, called with it: PEFT copies layers that train in full, and the method with them."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation

    def __call__(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if layer.weight.requires_grad:
            return type(layer).forward(layer, x)
        return ProductWithFP8Gradient.apply(x, layer.weight, layer.bias, self.computation)  # type: ignore[no-any-return]


class ProductWithFP8Gradient(torch.autograd.Function):
    """x W^T + bias in the type of x, and the gradient of x by an FP8 product; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, computation: Computation
    ) -> torch.Tensor:
        """Compute `x` [..., in] -> [..., out]."""
        ctx.save_for_backward(weight)
        ctx.computation, ctx.input = computation, (x.shape, x.dtype)
        # Autocast, where it is on, casts as for any linear layer.
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        if not ctx.needs_input_grad[0]:
            return (None,) * 4
        (weight,) = ctx.saved_tensors
        shape, dtype = ctx.input
        rows = grads[0].reshape(-1, len(weight))
        values, scales = ctx.computation.quantize(weight)
        return input_gradient(rows, values, scales, ctx.computation).to(dtype).view(shape), None, None, None
