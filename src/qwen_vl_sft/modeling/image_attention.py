"""When the vision tower attends with this package's kernel: without gradients, for the heads that the kernel is made for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from qwen_vl_sft.modeling.kernel_check import difference, is_right

# PyTorch's kernel pads heads to 32, 64, 96 or 128 values: of these widths it computes more than there is.
_WIDER_THAN, _WIDEST = 64, 80
# Of shorter images the kernel's tiles would be half empty; windows of a tower, as Qwen2.5-VL's, are such.
_SHORTEST = 256


def takes_images(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, longest: int) -> bool:
    """Return whether the kernel takes such images, q, k, v [T, heads, D] on a GPU, and is right for them.

    Where it is not, a line says so once.
    """
    _, heads, width = q.shape
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        return False
    if longest < _SHORTEST or not _WIDER_THAN < width <= _WIDEST or k.shape != q.shape:
        return False
    return _is_right(heads, width, q.dtype, q.device)


def attend_to_images(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Attend inside segments: q, k, v [T, heads, D] -> [T, heads, D]; `bounds` [S + 1] are where segments begin and end."""
    from qwen_vl_sft.modeling import image_kernel

    return image_kernel.attend(q, k, v, bounds, longest, scale)


@functools.cache
def _is_right(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    def attend(q: Any, k: Any, v: Any, bounds: Any, _: Any, longest: int, *__: Any, scale: Any, causal: bool) -> Any:
        return attend_to_images(q, k, v, bounds, longest, scale)

    heads_alike = torch.empty(1, heads, width, dtype=dtype, device=device)
    return is_right(
        lambda: difference(attend, heads_alike, heads_alike, causal=False, learns=False),
        f"images are attended to with PyTorch's own attention of {heads} heads of {width} values",
    )
