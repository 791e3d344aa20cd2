"""A Triton kernel, with gradients, for rotary embeddings that rotate only the first values of each head."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate(
    x, y, cos, sin, sign, tokens, heads, width, half, batch_stride, head_stride, token_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row, token = number // tokens, number % tokens
    head, at, place = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :], tl.arange(0, WIDTH)[None, :]
    read = x + row * batch_stride + token * token_stride + head * head_stride
    written = y + (number * heads + head) * width
    inside = (head < heads) & (at < half)
    first = tl.load(read + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + half + at, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + number * 2 * half + at, mask=at < half, other=0.0).to(tl.float32)
    sine = sign * tl.load(sin + number * 2 * half + at, mask=at < half, other=0.0).to(tl.float32)
    tl.store(written + at, first * cosine - second * sine, mask=inside)
    tl.store(written + half + at, second * cosine + first * sine, mask=inside)
    rest = (head < heads) & (place >= 2 * half) & (place < width)
    tl.store(written + place, tl.load(read + place, mask=rest), mask=rest)


def rotate_partly(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R values of heads [B, heads, T, D] by `cos` and `sin` [B or 1, T, R], whose halves are equal."""
    # Positions that all rows share may come as those of one: the kernel reads each row's own.
    cos, sin = (angles.expand(len(query), -1, -1).contiguous() for angles in (cos, sin))
    return _Rotated.apply(query, cos, sin), _Rotated.apply(key, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    # In the order that attention over packed rows takes.
    y, half = torch.empty(batch, tokens, heads, width, dtype=x.dtype, device=x.device), cos.shape[-1] // 2
    strides = (x.stride(0), x.stride(1), x.stride(2))
    sizes = {"HEADS": heads, "HALF": half, "WIDTH": width}
    sizes = {name: triton.next_power_of_2(size) for name, size in sizes.items()}
    _rotate[(batch * tokens,)](x, y, cos, sin, sign, tokens, heads, width, half, *strides, **sizes)
    return y.transpose(1, 2)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None
