"""Triton kernels for the two norms of a gated delta-net layer, with gradients: of a fixed size, so that nothing is tuned.

flash-linear-attention has such norms too. It tries 25 sizes of the kernel for every 65,536 rows that a batch has more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 16
_WARPS = 4
# That of transformers and of flash-linear-attention.
_EPSILON = 1e-6


@triton.jit
def _normalise(x, y, inverse, stride, heads, rows, width, epsilon, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    read = x + ((row // heads) * stride + (row % heads) * width)[:, None] + at[None, :]
    value = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) + epsilon)
    tl.store(y + row[:, None] * width + at[None, :], value * factor[:, None], mask=inside)
    tl.store(inverse + row, factor, mask=row < rows)


@triton.jit
def _normalise_backward(grad, y, inverse, dx, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    place = row[:, None] * width + at[None, :]
    outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(inverse + row, mask=row < rows, other=0.0)
    found = (outer - value * tl.sum(outer * value, 1)[:, None]) * factor[:, None]
    tl.store(dx + place, found, mask=inside)


@triton.jit
def _gated(x, gate, weight, y, rows, width, epsilon, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    place = row[:, None] * width + at[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + epsilon)
    tl.store(y + place, value * factor[:, None] * w[None, :] * (z / (1.0 + tl.exp(-z))), mask=inside)


@triton.jit
def _gated_backward(
    grad, x, gate, weight, dx, dgate, parts, rows, width, epsilon, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    place = row[:, None] * width + at[None, :]
    outer = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-z))
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + epsilon)
    normed = value * factor[:, None]
    tl.store(dgate + place, outer * normed * w[None, :] * opened * (1.0 + z * (1.0 - opened)), mask=inside)
    to_normed = outer * (z * opened)
    tl.store(parts + tl.program_id(0) * width + at, tl.sum(to_normed * normed, 0), mask=at < width)
    to_normed *= w[None, :]
    apart = tl.sum(to_normed * normed, 1) / width
    tl.store(dx + place, (to_normed - normed * apart[:, None]) * factor[:, None], mask=inside)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Divide vectors by their length, computed in float32: [1, T, heads, D], whose last two axes are one run, -> the same."""
    found: torch.Tensor = _Normalised.apply(x)
    return found


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return weight * x / rms(x) * silu(gate) of rows [N, D], computed in float32 and rounded once."""
    found: torch.Tensor = _GatedNorm.apply(x, gate, weight, epsilon)
    return found


def _sizes(width: int) -> dict[str, int]:
    return {"ROWS": _ROWS, "WIDTH": triton.next_power_of_2(width), "num_warps": _WARPS}


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        _, tokens, heads, width = x.shape
        if x.stride(-1) != 1 or x.stride(-2) != width:
            x = x.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = tokens * heads
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(rows, _ROWS),)
        _normalise[grid](x, y, inverse, x.stride(1), heads, rows, width, _EPSILON, **_sizes(width))
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        y, inverse = ctx.saved_tensors
        grad, dx, rows, width = grad.contiguous(), torch.empty_like(y), inverse.shape[0], y.shape[-1]
        _normalise_backward[(triton.cdiv(rows, _ROWS),)](grad, y, inverse, dx, rows, width, **_sizes(width))
        return dx


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x, gate, y = x.contiguous(), gate.contiguous(), torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        rows, width = x.shape
        _gated[(triton.cdiv(rows, _ROWS),)](x, gate, weight, y, rows, width, epsilon, **_sizes(width))
        ctx.save_for_backward(x, gate, weight)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        rows, width = x.shape
        grad, dx, dgate = grad.contiguous(), torch.empty_like(x), torch.empty_like(gate)
        count = triton.cdiv(rows, _ROWS)
        # The gradient of the weight, in parts.
        parts = torch.empty(count, width, dtype=torch.float32, device=x.device)
        _gated_backward[(count,)](grad, x, gate, weight, dx, dgate, parts, rows, width, ctx.epsilon, **_sizes(width))
        return dx, dgate, parts.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None, None
