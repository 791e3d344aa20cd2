"""Compare the kernel that rotates the first values of heads with PyTorch's operations, before it is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from qwen_vl_sft.modeling.kernel_check import distance, farthest, is_right

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]
# Rows and tokens of an example.
_ROWS, _TOKENS = 2, 37


def first_values_rotated(original: Rotate) -> Rotate:
    """Return a function that rotates the first values of heads by the kernel, or by `original` where that is not right.

    It takes queries and keys [B, heads, T, D], and `cos` and `sin` [B or 1, T, R], whose halves are equal.
    """

    def rotate_first_values(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        heads = query.shape[1], key.shape[1]
        if not _is_right(original, heads, query.shape[3], cos.shape[-1], query.dtype, query.device):
            return original(query, key, cos, sin)
        from qwen_vl_sft.modeling.partial_rope import rotate_partly

        return rotate_partly(query, key, cos, sin)

    return rotate_first_values


@functools.cache
def _is_right(
    original: Rotate, heads: tuple[int, int], width: int, rotated: int, dtype: torch.dtype, device: torch.device
) -> bool:
    return is_right(
        lambda: _difference(original, heads, width, rotated, dtype, device),
        f"heads of {width} values, of which {rotated} are rotated, are rotated in PyTorch's own operations",
    )


def _difference(
    original: Rotate, heads: tuple[int, int], width: int, rotated: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the larger |a - b| / |b| of queries and keys. Gradients are rotated back by the same kernel."""
    from qwen_vl_sft.modeling.partial_rope import rotate_partly

    # A separate generator, so that training's random numbers do not change.
    numbers = torch.Generator(device).manual_seed(0)
    query, key = (
        torch.randn(_ROWS, _TOKENS, count, width, generator=numbers, device=device).to(dtype).transpose(1, 2)
        for count in heads
    )
    angles = torch.randn(_ROWS, _TOKENS, rotated // 2, generator=numbers, device=device).repeat(1, 1, 2)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        found = rotate_partly(query, key, *turns)
        wanted = original(query.float(), key.float(), *(one.float() for one in turns))
    return farthest(distance(one, other) for one, other in zip(found, wanted, strict=True))
