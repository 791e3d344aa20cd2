"""A Triton kernel that sums up the gradients of copies in float32, without atomic additions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_copies(copies, order, starts, out, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(tl.load(starts + token), tl.load(starts + token + 1)):
        copy = tl.load(order + number)
        total += tl.load(copies + copy * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + token * size + at, total.to(out.dtype.element_ty), mask=at < size)


def sum_copies(copies: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sum the copies [K, ...] of each token, one after another: token t's are `order[starts[t] : starts[t + 1]]`."""
    tokens, size = len(starts) - 1, copies[0].numel()
    out = copies.new_empty(tokens, *copies.shape[1:])
    block = triton.next_power_of_2(size)
    _sum_copies[(tokens,)](copies.contiguous(), order, starts, out, size, BLOCK=block, num_warps=max(1, block // 512))
    return out
