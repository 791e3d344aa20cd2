"""Attention inside segments by PyTorch's plain function: a fallback, and the reference for kernels."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_by_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """Call once for each piece: [T, heads, D] -> [T, heads, D]. With `causal` a piece's last query sees all its keys."""
    sizes_q, sizes_k = bounds_q.diff().tolist(), bounds_k.diff().tolist()
    attended = []
    for q, k, v in zip(query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q)) if causal else None
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)
