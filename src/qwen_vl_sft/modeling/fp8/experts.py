"""FP8 weights of the experts of a layer, one stack [E, out, in] with a scale for each row of each expert.

Products are grouped: the rows of an input, sorted by expert, meet the matrix of their own. In FP8 they are Hopper's; other
GPUs multiply with the dequantized weights. Forward and backward are those of `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import _grouped_linear

from qwen_vl_sft.modeling.fp8.linear import INPUTS, Computation
from qwen_vl_sft.modeling.fp8.weights import E4M3, Quantized, quantize_rows

_HOPPER = 9
# What follows the name of a stack in that of its scales, which are bytes as other layers' are.
SCALE = "_scale"


@dataclass(frozen=True)
class FP8Stack:
    """What the bytes of a layer's experts stand for: `shape` is [E, out, in]."""

    shape: torch.Size
    computation: Computation


def packed_stack(weight: torch.Tensor, computation: Computation, storage: torch.dtype) -> tuple[Any, torch.Tensor]:
    """Quantize experts [E, out, in], one after the other: return the parameter of their values, and their scales as bytes."""
    values = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales = weight.new_empty(*weight.shape[:2], 4, dtype=torch.uint8)
    for number, one in enumerate(weight):
        quantized = quantize_rows(one)
        values[number], scales[number] = quantized.values.view(torch.uint8), quantized.scales.view(torch.uint8)
    parameter: Any = nn.Parameter(values.view(storage), requires_grad=False)
    parameter.quant_state = FP8Stack(weight.shape, computation)
    return parameter, scales


def dequantized_stack(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights [E, out, in] of e4m3 values and the scales of their rows [E, out, 1], whose type may be `dtype`."""
    return values.to(dtype) * scales.to(dtype)


def expert_product(
    experts: Any, name: str, stack: FP8Stack, inputs: torch.Tensor, ends: torch.Tensor, known: Quantized | None
) -> torch.Tensor:
    """Multiply inputs [S, in], sorted by expert, with the stack `name` of a layer's experts -> [S, out].

    Args:
        experts: the layer's experts.
        name: the parameter.
        stack: what its bytes stand for.
        inputs: the rows, sorted by expert; those of each end at `ends` [E].
        ends: int32.
        known: their quantized form, if it is known.
    """
    values = getattr(experts, name).view(E4M3)
    scales = getattr(experts, name + SCALE).view(torch.float32)
    return ExpertProduct.apply(inputs, known, values, scales, ends, stack.computation)  # type: ignore[no-any-return]


def selected_rows(hidden_states: torch.Tensor, at: torch.Tensor, computation: Computation) -> Quantized | None:
    """Return the quantized form of the rows `at` [S] of tokens [T, H], each of which is quantized once."""
    if not computation.forward:
        return None
    values, scales = INPUTS.of(hidden_states, computation.quantize)
    return Quantized(values.view(torch.uint8).index_select(0, at).view(E4M3), scales.index_select(0, at))


class ExpertProduct(torch.autograd.Function):
    """A grouped product with frozen FP8 weights, and the gradient of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        known: Quantized | None,
        values: torch.Tensor,
        scales: torch.Tensor,
        ends: torch.Tensor,
        computation: Computation,
    ) -> torch.Tensor:
        """Compute [S, out] in the type of `inputs`."""
        ctx.save_for_backward(values, scales, ends)
        ctx.computation, ctx.dtype = computation, inputs.dtype
        if not computation.forward:
            return _grouped_linear(inputs, dequantized_stack(values, scales, inputs.dtype), ends)
        quantized = computation.quantize(inputs) if known is None else known
        return grouped_product(quantized, values, scales, ends, computation.emulated).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of the inputs: scales of the weights' rows stand along the sum, as in `linear`."""
        values, scales, ends = ctx.saved_tensors
        computation, grad = ctx.computation, grads[0]
        if not computation.backward:
            found = _grouped_linear(grad, dequantized_stack(values, scales, grad.dtype).transpose(-1, -2), ends)
            return found.to(ctx.dtype), *(None,) * 5
        numbers = torch.searchsorted(ends, torch.arange(len(grad), device=grad.device, dtype=ends.dtype), right=True)
        # Powers of two, exact in every type.
        quantized = computation.quantize(grad * scales[..., 0].to(grad.dtype).index_select(0, numbers))
        turned = transposed_stack(values, computation)
        ones = scales.new_ones(len(values), values.shape[-1], 1)
        return grouped_product(quantized, turned, ones, ends, computation.emulated).to(ctx.dtype), *(None,) * 5


def transposed_stack(values: torch.Tensor, computation: Computation) -> torch.Tensor:
    """Return the transposes [E, in, out] of e4m3 values [E, out, in]; the last dimension is contiguous."""
    experts, out, size = values.shape
    flat = computation.transpose(values.reshape(experts * out, size))
    return flat.view(size, experts, out).permute(1, 0, 2)


def grouped_product(
    left: Quantized, right: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor, emulated: bool
) -> torch.Tensor:
    """Return each run of rows of `left` [S, K], which ends at `ends` [E], times the transpose of its matrix of `right`.

    Args:
        left: the quantized rows.
        right: e4m3 values [E, N, K], the last dimension contiguous.
        scales: of their rows [E, N, 1].
        ends: int32 [E].
        emulated: compute in float32, from the same FP8 values.

    Returns:
        [S, N], bfloat16, and float32 where it is emulated.
    """
    if emulated:
        with torch.autocast(right.device.type, enabled=False):
            return _grouped_linear(
                left.values.float() * left.scales, dequantized_stack(right, scales, torch.float32), ends
            )
    if torch.cuda.get_device_capability(right.device)[0] != _HOPPER:
        rows = (left.values.float() * left.scales).bfloat16()
        return _grouped_linear(rows, dequantized_stack(right, scales, torch.bfloat16), ends)
    return torch._scaled_grouped_mm(
        left.values,
        right.transpose(-2, -1),
        left.scales.view(-1),
        scales.reshape(len(right), -1),
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
