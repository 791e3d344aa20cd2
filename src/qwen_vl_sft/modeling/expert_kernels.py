"""Triton kernels around the products of experts: what stands between them is read once and written once.

The functions have the signatures of those in `token_routes`, and compute in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _spread(tokens, at, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    read = tokens + tl.load(at + row) * size + column
    tl.store(out + row * size + column, tl.load(read, mask=column < size), mask=column < size)


@triton.jit
def _summed(rows, places, out, size, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice)
        total += tl.load(rows + place * size + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _gated(widened, weights, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    read = widened + row * 2 * size + column
    gate = tl.load(read, mask=column < size, other=0.0).to(tl.float32)
    up = tl.load(read + size, mask=column < size, other=0.0).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up * tl.load(weights + row).to(tl.float32)
    tl.store(out + row * size + column, found.to(out.dtype.element_ty), mask=column < size)


@triton.jit
def _gated_gradients(grad, widened, weights, of_widened, of_weights, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row * 2 * size + column
    gate = tl.load(widened + at, mask=column < size, other=0.0).to(tl.float32)
    up = tl.load(widened + at + size, mask=column < size, other=0.0).to(tl.float32)
    of_out = tl.load(grad + row * size + column, mask=column < size, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    of_weight = tl.sum(of_out * silu * up, 0)
    tl.store(of_weights + row, of_weight.to(of_weights.dtype.element_ty))
    of_out *= tl.load(weights + row).to(tl.float32)
    of_gate = of_out * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(of_widened + at, of_gate.to(of_widened.dtype.element_ty), mask=column < size)
    tl.store(of_widened + at + size, (of_out * silu).to(of_widened.dtype.element_ty), mask=column < size)


def spread(tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return the rows `at` [S] of `tokens` [T, H] -> [S, H]."""
    size = tokens.shape[1]
    out = tokens.new_empty(len(at), size)
    if len(out):
        _spread[(len(out),)](tokens.contiguous(), at, out, size, **_sizes(size))
    return out


def summed(rows: torch.Tensor, places: torch.Tensor, choices: int) -> torch.Tensor:
    """Return for each token the sum of the rows [S, H] at its `choices` places, of `places` [T * choices] -> [T, H]."""
    size = rows.shape[1]
    out = rows.new_empty(len(places) // choices, size)
    if len(out):
        _summed[(len(out),)](rows.contiguous(), places, out, size, CHOICES=choices, **_sizes(size))
    return out


def gated(widened: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * weight of gates and ups side by side [S, 2 I] and `weights` [S] -> [S, I]."""
    size = widened.shape[1] // 2
    out = widened.new_empty(len(widened), size)
    if len(out):
        _gated[(len(out),)](widened.contiguous(), weights.contiguous(), out, size, **_sizes(size))
    return out


def gated_gradients(
    grad: torch.Tensor, widened: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of what `gated` takes from that of its output [S, I]."""
    size = widened.shape[1] // 2
    widened, weights = widened.contiguous(), weights.contiguous()
    found = torch.empty_like(widened), torch.empty_like(weights)
    if len(widened):
        _gated_gradients[(len(widened),)](grad.contiguous(), widened, weights, *found, size, **_sizes(size))
    return found


def _sizes(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
