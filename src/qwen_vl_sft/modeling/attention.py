"""Which attention is used, and one call over all images or packed rows where PyTorch's own kernels do the work.

transformers' Qwen-VL vision towers see all images of a batch as one sequence. With sdpa they loop over images in Python,
in every layer; an attention whose name holds "flash" gets the boundaries instead and makes one call. The language model
gets the boundaries of packed rows from the batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwen_vl_sft.errors import UserError

# "flash" in the name makes the vision tower pass the boundaries between images.
SEGMENTED = "segmented_flash"
PACKED = "packed_rows"


def resolve_attention(wanted: str, on_cpu: bool, dtype: str) -> str:
    """The attention implementation of the language model: the wanted one, or for "auto" the best installed.

    Raises `UserError` when the wanted one is not installed or does not fit the device or the dtype.
    """
    installed = {
        "flash_attention_3": importlib.util.find_spec("flash_attn_interface") is not None,
        "flash_attention_2": importlib.util.find_spec("flash_attn") is not None,
    }
    if wanted == "auto":
        usable = [] if on_cpu or dtype == "float32" else [name for name, found in installed.items() if found]
        return usable[0] if usable else "sdpa"
    if wanted in installed:
        if not installed[wanted]:
            raise UserError(
                f"attn_implementation: {wanted} is not installed; install it, or leave the key out for auto"
            )
        if on_cpu or dtype == "float32":
            why = "runs on CUDA only" if on_cpu else "takes bfloat16 or float16, not float32"
            raise UserError(f"attn_implementation: {wanted} {why}; leave the key out for auto")
    elif wanted not in ("sdpa", "eager"):
        raise UserError(
            f"attn_implementation: {wanted!r} is unknown; auto, sdpa, eager, flash_attention_2 or flash_attention_3"
        )
    return wanted


def use_segmented_vision_attention(model: Any) -> None:
    """Have the vision tower attend in one call over all images, exactly, with PyTorch's own kernels."""
    AttentionInterface.register(SEGMENTED, _segmented_attention)
    AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
    model.set_attn_implementation({"vision_config": SEGMENTED})


def use_packed_attention(model: Any) -> None:
    """Have the language model attend inside the pieces of packed rows; padded batches and generation go on as before."""
    AttentionInterface.register(PACKED, _packed_attention)
    AttentionMaskInterface.register(PACKED, _packed_mask)
    model.set_attn_implementation({"text_config": PACKED})


def _packed_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for packed rows, which have boundaries instead; padded batches need theirs."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside the pieces of one packed row: [1, heads, T, D] -> [1, T, heads, D].

    Keys of a piece end with the piece itself, so its last query sees all of them.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        if module.training and attention_mask is None:
            raise RuntimeError("a batch in training has neither boundaries nor a mask: rows would attend to each other")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = _in_one_row(query, key, value, attention_mask, dropout)
    if kv_index is not None:
        k, v = k.index_select(0, kv_index), v.index_select(0, kv_index)
    if _has_varlen_kernel(value):
        bounds = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _varlen_attention()(q, k, v, *bounds, scale=scaling, window_size=(-1, 0))[None], None
    return _attend_by_piece(q, k, v, cu_seq_lens_q, cu_seq_lens_k, scaling)[None], None


def _attend_by_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """A call for each piece: [T, heads, D] -> [T, heads, D]."""
    sizes_q, sizes_k = bounds_q.diff().tolist(), bounds_k.diff().tolist()
    attended = []
    for q, k, v in zip(query.split(sizes_q), key.split(sizes_k), value.split(sizes_k), strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        attended.append(out[0].transpose(0, 1))
    return torch.cat(attended)


def _segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside segments of one row: `query`, `key`, `value` [1, heads, T, D] -> [1, T, heads, D]."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = _in_one_row(query, key, value, attention_mask, dropout)
    if _has_varlen_kernel(value):
        bounds = (cu_seq_lens_q, cu_seq_lens_q, int(max_length_q), int(max_length_q))
        return _varlen_attention()(q, k, v, *bounds, scale=scaling)[None], None
    return _attend_by_length(q, k, v, cu_seq_lens_q, scaling)[None], None


def _in_one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float
) -> list[torch.Tensor]:
    """Query, key and value of one dtype: [1, heads, T, D] -> [T, heads, D]."""
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise RuntimeError("packed rows take no attention mask and no attention dropout, and batches of one sequence")
    # Under autocast the rotary embedding leaves query and key in float32.
    # Not by [0], whose gradient is written into zeros.
    return [tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value)]


def _has_varlen_kernel(value: torch.Tensor) -> bool:
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)


def _varlen_attention() -> Callable[..., Any]:
    # Imported here: it needs a CUDA build of PyTorch.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _attend_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One call when all segments are of one length, as charts of one size are; else one for each: [T, heads, D]."""
    lengths = boundaries.diff()
    if (lengths == lengths[0]).all():
        # [count * length, heads, D] -> [count, heads, length, D]
        shape = (len(lengths), int(lengths[0]))
        q, k, v = (tensor.unflatten(0, shape).transpose(1, 2) for tensor in (query, key, value))
        return scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1)
    splits = zip(
        *(tensor.transpose(0, 1).split(lengths.tolist(), dim=1) for tensor in (query, key, value)), strict=True
    )
    attended = [scaled_dot_product_attention(q[None], k[None], v[None], scale=scaling)[0] for q, k, v in splits]
    return torch.cat(attended, dim=1).transpose(0, 1)
