"""FP8 weights of official checkpoints: a scale for each block of 128 x 128 values, taken as they are.

Inputs and gradients get a scale for each 128 values of a row. Blocks of a transposed weight are the transposed blocks, so
that one copy of the weight serves both directions here too. Products of this kind are Hopper's; other GPUs and emulations
of other sizes multiply with the dequantized weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_vl_sft.modeling.fp8.linear import Computation, FP8Linear, QuantizedInput, computed_type
from qwen_vl_sft.modeling.fp8.weights import BLOCK, E4M3, Quantized, dequantize

_HOPPER = 9
# Scales of an input lie column after column, in columns of a multiple of this.
_ROWS = 4
# Inputs with a scale for each part; those of `linear` have one for each row.
_INPUTS = QuantizedInput()


class FP8BlockLinear(FP8Linear):
    """A frozen linear layer with FP8 weights and the scales of their blocks; see `FP8Linear`.

    While a checkpoint is loaded, its scales come as float32 in `weight_scale_inv`, which `finish` takes to bytes.
    """

    def _make_scales(self) -> None:
        blocks = -(-self.out_features // BLOCK), -(-self.in_features // BLOCK)
        self.weight_scale_inv: torch.Tensor
        self.register_buffer("weight_scale_inv", torch.empty(blocks, dtype=torch.float32))

    def finish(self) -> None:
        """Keep the scales that were loaded as bytes, which no strategy casts."""
        scales = self.weight_scale_inv
        del self.weight_scale_inv
        self.register_buffer("weight_scale", scales.float().contiguous().view(torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `x` [..., in] -> [..., out] in the type of `x`, or that of autocast."""
        quantized = None
        if self.computation.forward and in_blocks(self.values, self.computation.emulated):
            quantized = _INPUTS.of(x, lambda rows: quantize_parts(rows, self.computation))
        return BlockProduct.apply(  # type: ignore[no-any-return]
            x, quantized, self.values, self.scales, self.bias, self.computation
        )


class BlockProduct(torch.autograd.Function):
    """x W^T + bias and the gradient of x, with a weight in blocks; without `quantized`, x is multiplied in its own type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantized: Quantized | None,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        computation: Computation,
    ) -> torch.Tensor:
        """Compute the product."""
        ctx.save_for_backward(values, scales)
        ctx.computation, ctx.input = computation, (x.shape, x.dtype)
        dtype = computed_type(x)
        if quantized is not None:
            found = block_product(quantized, values, scales, computation.emulated).to(dtype)
            if bias is not None:
                found = found + bias.to(dtype)
        else:
            rows = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):
                weight = dequantize(values, scales).to(dtype)
                found = nn.functional.linear(rows.to(dtype), weight, None if bias is None else bias.to(dtype))
        return found.view(*x.shape[:-1], len(values))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        values, scales = ctx.saved_tensors
        computation, (shape, dtype) = ctx.computation, ctx.input
        rows = grads[0].reshape(-1, len(values))
        if computation.backward and in_blocks(values, computation.emulated):
            transposed = computation.transpose(values), scales.t().contiguous()
            found = block_product(quantize_parts(rows, computation), *transposed, computation.emulated)
        else:
            found = rows @ dequantize(values, scales).to(rows.dtype)
        return found.to(dtype).view(shape), *(None,) * 5


def in_blocks(values: torch.Tensor, emulated: bool) -> bool:
    """Return whether products in blocks take a weight on its device."""
    if any(size % BLOCK for size in values.shape):
        return False
    return emulated or (values.is_cuda and torch.cuda.get_device_capability(values.device)[0] == _HOPPER)


def quantize_parts(rows: torch.Tensor, computation: Computation) -> Quantized:
    """Quantize rows [M, K] with a scale for each 128 values: values [M, K], scales [M, K / 128]."""
    values, scales = computation.quantize(rows.contiguous().view(-1, BLOCK))
    return Quantized(values.view(rows.shape), scales.view(len(rows), -1))


def block_product(left: Quantized, right: torch.Tensor, scales: torch.Tensor, emulated: bool) -> torch.Tensor:
    """Return `left` [M, K], with a scale for each 128 values, times the transpose of `right` [N, K] in blocks.

    Returns:
        [M, N], bfloat16, and float32 where it is emulated.
    """
    if emulated:
        spread = left.scales.repeat_interleave(BLOCK, 1)
        with torch.autocast(right.device.type, enabled=False):
            return (left.values.float() * spread) @ dequantize(right, scales).t()
    kinds: Any = nn.functional
    rows = len(left.values)
    values, spread = left
    if rows % _ROWS:
        padding = (0, 0, 0, -rows % _ROWS)
        values = nn.functional.pad(values.view(torch.uint8), padding).view(E4M3)
        spread = nn.functional.pad(spread, padding)
    by_column = spread.t().contiguous().t()
    found = kinds.scaled_mm(
        values,
        right.t(),
        by_column,
        kinds.ScalingType.BlockWise1x128,
        scales.t(),
        kinds.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return found[:rows]  # type: ignore[no-any-return]
