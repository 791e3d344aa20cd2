"""Numbers in FP8 (e4m3): values of a row share a scale, which is a power of two.

e4m3 has 3 bits of mantissa and reaches from 2^-9 to 448 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433). It
rounds each value by at most 6.25%, whatever the scale; a scale that is a power of two therefore costs no precision, and
spares all rounding but that one: dividing by it is exact, and a dequantized weight has its exact value in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Products take layers whose sizes are multiples of this.
MULTIPLE = 16
# Rows of zeros get the scale of this; smaller numbers than a float32's scale can reach are zeros too.
SMALLEST_MAXIMUM = 2.0**-100
# Scales of official checkpoints are of blocks so large (rows, columns).
BLOCK = 128
_MANTISSA_BELOW_448, _EXPONENT = 0x1FFFFF, 0x7F800000


class Quantized(NamedTuple):
    """`values` [M, K] in e4m3, and `scales` [M, 1] float32, by which they are multiplied."""

    values: torch.Tensor
    scales: torch.Tensor


def scale_of(maximum: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two by which values up to `maximum` (float32) must be divided to be at most 448.

    It is worked out from the bits, and so is the same on every device: 448 = 1.75 * 2^8. Infinity and NaN give infinity,
    which makes NaN of the values and so of the product.
    """
    bits = maximum.clamp(min=SMALLEST_MAXIMUM).view(torch.int32)
    return ((bits + _MANTISSA_BELOW_448) & _EXPONENT).view(torch.float32) * 2.0**-8


def quantize_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
    """Quantize `x` [M, K], of any type of floats, with a scale for each row.

    With `columns` [K] float32 the values of each column are multiplied by its number first.
    """
    values = x.float()
    if columns is not None:
        values = values * columns
    scales = scale_of(values.abs().amax(1, keepdim=True))
    return Quantized((values * (1 / scales)).to(E4M3), scales)


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the float32 weight [N, K] of e4m3 values and the scales of its rows [N, 1] or blocks [N / 128, K / 128]."""
    if scales.shape[1] == 1 and len(scales) == len(values):
        return values.float() * scales
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread


def fits(out_features: int, in_features: int) -> bool:
    """Return whether the products of FP8 take a layer of this shape."""
    return out_features % MULTIPLE == 0 and in_features % MULTIPLE == 0
