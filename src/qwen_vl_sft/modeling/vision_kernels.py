"""Triton kernels of the vision tower for passes without gradients: they are ready in less than a second.

Those that PyTorch compiles for training take several, and again under autocast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _quick_gelu(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, value / (1.0 + tl.exp(-1.702 * value)), mask=at < size)


@triton.jit
def _rotate(x, y, cos, sin, token_stride, head_stride, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside, angle = (head < heads) & (at < half), token * 2 * half + at
    read = x + token * token_stride + head * head_stride + at
    first = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + half, mask=inside, other=0.0).to(tl.float32)
    of_first = tl.load(cos + angle, mask=at < half, other=0.0).to(tl.float32)
    of_second = tl.load(cos + angle + half, mask=at < half, other=0.0).to(tl.float32)
    written = y + (token * heads + head) * 2 * half + at
    sine = tl.load(sin + angle, mask=at < half, other=0.0).to(tl.float32)
    tl.store(written, first * of_first - second * sine, mask=inside)
    sine = tl.load(sin + angle + half, mask=at < half, other=0.0).to(tl.float32)
    tl.store(written + half, second * of_second + first * sine, mask=inside)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(1.702 x) of any shape, computed in float32."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.numel()
    _quick_gelu[(triton.cdiv(size, _BLOCK),)](x, y, size, BLOCK=_BLOCK)
    return y


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys [T, heads, D] by `cos` and `sin` [T, D], computed in float32."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    tokens, heads, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, half = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device), width // 2
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _rotate[(tokens,)](x, y, cos, sin, x.stride(0), x.stride(1), heads, half, **sizes)
    return y
