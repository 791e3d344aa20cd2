"""The short causal convolution of gated delta-net layers as a Triton kernel, with gradients, of a fixed size.

A token names the inputs before it (`window` of `pieces_of`), so that branches take the last ones of their prefix where they
lie. flash-linear-attention's convolution takes copies of them, and tunes itself over 32 sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Tokens and channels that are in work at once.
_SIZES = {"TOKENS": 16, "CHANNELS": 64, "num_warps": 2}


@triton.jit
def _before_activation(x, window, weight, token, there, channel, inside, stride, WIDTH: tl.constexpr):
    """Convolve tokens, each with the inputs that its window names."""
    both = there[:, None] & inside[None, :]
    own = tl.load(x + token.to(tl.int64)[:, None] * stride + channel[None, :], mask=both, other=0.0).to(tl.float32)
    found = own * tl.load(weight + channel * WIDTH + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    for step in tl.static_range(1, WIDTH):
        at = tl.load(window + token * (WIDTH - 1) + step - 1, mask=there, other=-1)
        known = (at >= 0)[:, None] & inside[None, :]
        value = tl.load(x + at.to(tl.int64)[:, None] * stride + channel[None, :], mask=known, other=0.0)
        factor = tl.load(weight + channel * WIDTH + WIDTH - 1 - step, mask=inside, other=0.0).to(tl.float32)
        found += value.to(tl.float32) * factor[None, :]
    return found


# Another number of tokens compiles nothing.
@triton.jit(do_not_specialize=["tokens"])
def _convolve(
    x, window, weight, y, tokens, channels, stride,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there, inside = token < tokens, channel < channels
    found = _before_activation(x, window, weight, token, there, channel, inside, stride, WIDTH)
    place = token.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y + place, found / (1.0 + tl.exp(-found)), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _slopes(
    x, window, weight, dy, slopes, parts, tokens, channels, stride,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of what tokens are before the activation, and the weight's, in parts."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there, inside = token < tokens, channel < channels
    both = there[:, None] & inside[None, :]
    before = _before_activation(x, window, weight, token, there, channel, inside, stride, WIDTH)
    place = token.to(tl.int64)[:, None] * channels + channel[None, :]
    grad = tl.load(dy + place, mask=both, other=0.0).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-before))
    slope = grad * opened * (1.0 + before * (1.0 - opened))
    tl.store(slopes + place, slope, mask=both)
    if LEARNS:
        part = parts + (tl.program_id(1).to(tl.int64) * channels + channel) * WIDTH
        value = tl.load(x + token.to(tl.int64)[:, None] * stride + channel[None, :], mask=both, other=0.0)
        tl.store(part + WIDTH - 1, tl.sum(slope * value.to(tl.float32), 0), mask=inside)
        for step in tl.static_range(1, WIDTH):
            at = tl.load(window + token * (WIDTH - 1) + step - 1, mask=there, other=-1)
            known = (at >= 0)[:, None] & inside[None, :]
            value = tl.load(x + at.to(tl.int64)[:, None] * stride + channel[None, :], mask=known, other=0.0)
            tl.store(part + WIDTH - 1 - step, tl.sum(slope * value.to(tl.float32), 0), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _gather(
    window, weight, slopes, dx, tokens, channels,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add up for each input what it is to itself and to the tokens that follow it."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there, inside = token < tokens, channel < channels
    both = there[:, None] & inside[None, :]
    place = token.to(tl.int64)[:, None] * channels + channel[None, :]
    own = tl.load(slopes + place, mask=both, other=0.0).to(tl.float32)
    found = own * tl.load(weight + channel * WIDTH + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    for step in tl.static_range(1, WIDTH):
        later = token + step
        follows = later < tokens
        follows &= tl.load(window + later * (WIDTH - 1) + step - 1, mask=follows, other=-1) == token
        known = follows[:, None] & inside[None, :]
        slope = tl.load(slopes + place + step * channels, mask=known, other=0.0).to(tl.float32)
        factor = tl.load(weight + channel * WIDTH + WIDTH - 1 - step, mask=inside, other=0.0).to(tl.float32)
        found += slope * factor[None, :]
    tl.store(dx + place, found, mask=both)


@triton.jit
def _add_takers(
    weight, slopes, dx, taken, bounds, takers, channels, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Add what inputs are to tokens that do not follow them in the sequence."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside, number = channel < channels, tl.program_id(1)
    place = dx + tl.load(taken + number).to(tl.int64) * channels + channel
    found = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for taker in range(tl.load(bounds + number), tl.load(bounds + number + 1)):
        token, step = tl.load(takers + 2 * taker).to(tl.int64), tl.load(takers + 2 * taker + 1)
        slope = tl.load(slopes + token * channels + channel, mask=inside, other=0.0).to(tl.float32)
        found += slope * tl.load(weight + channel * WIDTH + WIDTH - 1 - step, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, found, mask=inside)


def convolved(x: torch.Tensor, weight: torch.Tensor, pieces: dict[str, Any]) -> torch.Tensor:
    """Convolve each token with the inputs before it, and activate (SiLU): computed in float32, rounded once.

    Args:
        x: [1, T or more, C] inputs; those behind the T tokens of `pieces` are none that are convolved.
        weight: [C, kernel].
        pieces: of `pieces_of`.

    Returns [1, T, C].
    """
    kept = [pieces.get(name) for name in ("window", "taken", "taken_bounds", "takers")]
    found: torch.Tensor = _Convolved.apply(x, weight, *kept)
    return found


def _grid(tokens: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(channels, _SIZES["CHANNELS"]), triton.cdiv(tokens, _SIZES["TOKENS"])


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        window: torch.Tensor,
        taken: torch.Tensor | None,
        bounds: torch.Tensor | None,
        takers: torch.Tensor | None,
    ) -> torch.Tensor:
        x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
        tokens, (channels, width) = len(window), weight.shape
        y = torch.empty(1, tokens, channels, dtype=x.dtype, device=x.device)
        grid = _grid(tokens, channels)
        _convolve[grid](x, window, weight, y, tokens, channels, x.stride(1), WIDTH=width, **_SIZES)
        ctx.save_for_backward(x, weight, window, taken, bounds, takers)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, window, taken, bounds, takers = ctx.saved_tensors
        tokens, (channels, width), learns = len(window), weight.shape, ctx.needs_input_grad[1]
        assert x.shape[1] == tokens, "inputs that stand outside of the sequence take no gradient"
        grad, grid = grad.contiguous(), _grid(tokens, channels)
        slopes, dx = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        # The gradient of the weight, in parts.
        parts = torch.empty(grid[1] if learns else 0, channels, width, dtype=torch.float32, device=x.device)
        inputs = (x, window, weight, grad, slopes, parts, tokens, channels, x.stride(1))
        _slopes[grid](*inputs, WIDTH=width, LEARNS=learns, **_SIZES)
        _gather[grid](window, weight, slopes, dx, tokens, channels, WIDTH=width, **_SIZES)
        if taken is not None:
            places = (weight, slopes, dx, taken, bounds, takers, channels)
            _add_takers[(grid[0], len(taken))](*places, WIDTH=width, CHANNELS=_SIZES["CHANNELS"])
        return dx, parts.sum(0).to(weight.dtype) if learns else None, None, None, None, None
