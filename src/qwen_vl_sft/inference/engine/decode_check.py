"""Compare the kernel that decodes with float32 attention, once for each shape of heads, before it is used."""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_vl_sft.inference.engine.cache import KeyValueCache
from qwen_vl_sft.modeling.kernel_check import distance, farthest, is_right

# Tokens of rows before the new one: the first of a prompt, a whole step of the kernel, and a part of one.
_LENGTHS = (0, 63, 517)


def has_decode_kernel(heads: int, cache: KeyValueCache) -> bool:
    """Return whether the kernel computes attention for a cache on a GPU; where it does not, a line says so."""
    if cache.dtype not in (torch.bfloat16, torch.float16):
        return False
    keys = next(iter(cache.keys.values()), None)
    return keys is not None and _computes_attention(heads, keys.shape[1], keys.shape[2], cache.dtype, cache.device)


@functools.cache
def _computes_attention(heads: int, of_keys: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    return is_right(
        lambda: difference(heads, of_keys, width, dtype, device),
        f"answers are decoded with PyTorch's own attention of {heads} heads of {width} values",
    )


def difference(heads: int, of_keys: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return how far the kernel is from float32 attention for such heads: |a - b| / |b|, that of the row farthest off."""
    from qwen_vl_sft.inference.engine.decode_kernel import MOST_PARTS, attend_to_slots

    numbers = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(dtype)

    rows, longest = len(_LENGTHS), max(_LENGTHS) + 1
    slots = 2 * rows * longest
    q, keys, values = random(rows, heads, width), random(slots, of_keys, width), random(slots, of_keys, width)
    table = torch.randperm(slots, generator=numbers, device=device)[: (rows + 1) * longest].view(rows + 1, longest)
    places = torch.arange(rows, 0, -1, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # Many rows are computed whole, by other code than few.
        lengths = torch.tensor(_LENGTHS, device=device)
        ways = [attend_to_slots(q, keys, values, table, places, lengths, None, parts) for parts in (1, MOST_PARTS)]
        apart = []
        for row, length in enumerate(_LENGTHS):
            own = table[rows - row, : length + 1]
            k, v = (tensor[own].float().transpose(0, 1) for tensor in (keys, values))
            wanted = scaled_dot_product_attention(q[row].float()[:, None], k, v, enable_gqa=True)[:, 0]
            apart += [distance(found[row], wanted) for found in ways]
    return farthest(apart)
