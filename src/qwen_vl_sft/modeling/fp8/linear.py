"""Linear layers whose weight is FP8, one copy of it for both directions.

Forward, y = x W^T: the scales of W's rows are those of y's columns. Backward, dx = dy W: they stand along the sum, so dy is
multiplied by them before it is quantized, which is exact up to its one rounding, as they are powers of two. Tensor cores
want the second factor transposed there; that copy lasts for the one product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_vl_sft.modeling.fp8.products import product
from qwen_vl_sft.modeling.fp8.weights import E4M3, Quantized, dequantize, quantize_rows


def transpose(values: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of the transpose of e4m3 values."""
    return values.view(torch.uint8).t().contiguous().view(E4M3)


@dataclass(frozen=True)
class Computation:
    """How layers compute.

    Attributes:
        forward: the forward product is FP8; otherwise the weight is dequantized to the type of the input.
        backward: the same of the product that gives the input's gradient.
        emulated: FP8 products are computed in float32.
        quantize: what quantizes rows, see `quantize_rows`.
        transpose: what transposes values.
    """

    forward: bool = True
    backward: bool = True
    emulated: bool = False
    quantize: Callable[..., Quantized] = quantize_rows
    transpose: Callable[[torch.Tensor], torch.Tensor] = transpose


class Normed(NamedTuple):
    """What a norm made its output of, each row of `rows` [M, K] times its `rstd` [M], each column times its `weight` [K]."""

    rows: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor

    def times(self, left: torch.Tensor) -> torch.Tensor:
        """Return the transpose of `left` [M, r] times the norm's output, [r, K], without that output."""
        scaled = (left * self.rstd[:, None]).to(left.dtype)
        return (scaled.t() @ self.rows.to(left.dtype)) * self.weight.to(left.dtype)


class QuantizedInput:
    """Remembers the newest input that was quantized: q, k and v have one input, and so have gate and up."""

    def __init__(self) -> None:
        self._newest: tuple[weakref.ref[torch.Tensor], int, Quantized, Normed | None] | None = None

    def keep(self, x: torch.Tensor, quantized: Quantized, normed: Normed | None = None) -> None:
        """Remember an input's quantized form, and the norm that made it, until it is changed, or gone, or another comes."""
        if not x.is_inference():
            self._newest = weakref.ref(x, self._forget), x._version, quantized, normed

    def of(self, x: torch.Tensor, quantize: Callable[..., Quantized]) -> Quantized:
        """Return the quantized rows of an input [..., K]."""
        newest = self._newest
        if newest is not None and newest[0]() is x and newest[1] == x._version:
            return newest[2]
        quantized = quantize(x.detach().reshape(-1, x.shape[-1]))
        self.keep(x, quantized)
        return quantized

    def norm_of(self, x: torch.Tensor) -> Normed | None:
        """Return what a norm made an input of; None where none did, or it is no longer known."""
        newest = self._newest
        return newest[3] if newest is not None and newest[0]() is x and newest[1] == x._version else None

    def _forget(self, gone: Any) -> None:
        newest = self._newest
        if newest is not None and newest[0] is gone:
            self._newest = None


INPUTS = QuantizedInput()


class FP8Linear(nn.Linear):
    """A frozen linear layer with FP8 weights.

    Args:
        in_features: size of an input, a multiple of 16.
        out_features: size of an output, a multiple of 16.
        bias: whether it has one.
        computation: how it computes.
        dtype: the type of its bias.
        storage: the type that its bytes lie in. Bytes, unless FSDP2 splits them: that takes tensors of floats alone, in
            the type that it computes in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        computation: Computation,
        dtype: torch.dtype | None = None,
        storage: torch.dtype = torch.uint8,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.computation = computation
        values = torch.empty(out_features, in_features // storage.itemsize, dtype=storage)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale: torch.Tensor
        self._make_scales()
        own = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", own)

    def _make_scales(self) -> None:
        # As bytes, since strategies cast buffers of floats to the type that they compute in.
        self.register_buffer("weight_scale", torch.empty(self.out_features, 4, dtype=torch.uint8))

    @property
    def values(self) -> torch.Tensor:
        """Return the weight's e4m3 values [out, in]."""
        return self.weight.view(E4M3)

    @property
    def scales(self) -> torch.Tensor:
        """Return the float32 scales of its rows [out, 1], or of its blocks."""
        return self.weight_scale.view(torch.float32)

    def dequantized(self) -> torch.Tensor:
        """Return the weight [out, in] that it computes with, in float32."""
        return dequantize(self.values, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `x` [..., in] -> [..., out] in the type of `x`, or that of autocast."""
        quantized = INPUTS.of(x, self.computation.quantize) if self.computation.forward else None
        return FP8Product.apply(x, quantized, self.values, self.scales, self.bias, self.computation)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, e4m3"


class FP8Product(torch.autograd.Function):
    """x W^T + bias and the gradient of x; `quantized` is x [..., K] as rows, None for a product in the type of x."""

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
        if quantized is None:
            weight = dequantize(values, scales).to(dtype)
            return nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        found = product(quantized, values, scales.view(-1), bias, computation.emulated)
        return found.to(dtype).view(*x.shape[:-1], len(values))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradient of x."""
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        values, scales = ctx.saved_tensors
        shape, dtype = ctx.input
        rows = grads[0].reshape(-1, len(values))
        return input_gradient(rows, values, scales, ctx.computation).to(dtype).view(shape), *(None,) * 5


def input_gradient(
    grad: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, computation: Computation
) -> torch.Tensor:
    """Return the gradient of a layer's input [M, in] from that of its output [M, out]."""
    if not computation.backward:
        return grad @ dequantize(values, scales).to(grad.dtype)
    quantized = computation.quantize(grad, scales.view(-1))
    return product(quantized, computation.transpose(values), None, None, computation.emulated)


class LowerProduct(torch.autograd.Function):
    """A x of an adapter for the output x of a norm, and the gradients of both.

    x is not kept: the gradient of A is computed from what the norm's own gradient needs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, rows: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Compute [..., r] from `x` [..., K] and `a` [r, K]."""
        dtype = computed_type(x)
        own = a.to(dtype)
        ctx.save_for_backward(own, rows, rstd, weight)
        ctx.types = x.dtype, a.dtype
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(dtype), own)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of x and A."""
        a, *normed = ctx.saved_tensors
        of_x, of_a = ctx.types
        x_grad = (grads[0] @ a).to(of_x) if ctx.needs_input_grad[0] else None
        a_grad = Normed(*normed).times(grads[0].flatten(0, -2)).to(of_a) if ctx.needs_input_grad[1] else None
        return x_grad, a_grad, None, None, None


def computed_type(x: torch.Tensor) -> torch.dtype:
    """Return the type that a layer's output has, as any linear layer's: that of its input, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def packed(weight: torch.Tensor, storage: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [out, in]: return its values as bytes in tensors of `storage`, and its scales as bytes [out, 4]."""
    values, scales = quantize_rows(weight)
    return values.view(torch.uint8).view(storage), scales.view(torch.uint8)
