"""Compute attention in one call over all images of a batch, and over all packed rows.

transformers' Qwen-VL vision towers see all images of a batch as one sequence. With sdpa they loop over images in Python,
in every layer; an attention whose name holds "flash" gets the boundaries instead and makes one call. The language model
gets the boundaries of packed rows from the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwen_vl_sft.modeling.attention_kernels import FLASH, SDPA, has_varlen_kernel, varlen_kernel
from qwen_vl_sft.modeling.gathered_keys import gather
from qwen_vl_sft.modeling.image_attention import attend_to_images, takes_images
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

# "flash" in the name makes the vision tower pass the boundaries between images.
SEGMENTED = "segmented_flash"
# Ends the name of the one that may take this package's kernel.
OWN = "_own"
# Without it, as the language model of padded batches needs its masks.
PACKED = "packed_rows"


def use_segmented_vision_attention(model: Any, kernel: str = SDPA, own: bool = False) -> None:
    """Have the vision tower attend in one call over all images, exactly, with a kernel that `varlen_kernel` knows.

    With `own` this package's kernel takes the place of PyTorch's where there are no gradients, and it is right.
    """
    own = own and kernel == SDPA
    name = f"{SEGMENTED}{OWN}" if own else _named(SEGMENTED, kernel)
    AttentionInterface.register(name, partial(_segmented_attention, kernel, own))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation({"vision_config": name})


def use_packed_attention(model: Any, kernel: str = SDPA) -> None:
    """Have the language model attend inside the pieces of packed rows; padded batches and generation take sdpa."""
    name = _named(PACKED, kernel)
    AttentionInterface.register(name, partial(_packed_attention, kernel))
    AttentionMaskInterface.register(name, _packed_mask)
    model.set_attn_implementation({"text_config": name})


def _named(name: str, kernel: str) -> str:
    """Return a name for each kernel: models in one process may have different ones."""
    return name if kernel == SDPA else f"{name}_{kernel.removeprefix('flash_attention_')}"


def kernel_of(implementation: str) -> str:
    """Return the kernel that a language model's attention implementation stands for."""
    named = {_named(PACKED, kernel): kernel for kernel in FLASH}
    return named.get(implementation, implementation if implementation in FLASH else SDPA)


def _packed_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return None for packed rows, which have boundaries instead of a mask; padded batches need theirs."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


def _packed_attention(
    kernel: str,
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
    """Compute causal attention inside the pieces of one packed row: [1, heads, T, D] -> [1, T, heads, D].

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
        k, v = gather(k, kv_index), gather(v, kv_index)
    if has_varlen_kernel(value):
        bounds = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return varlen_kernel(kernel)(q, k, v, *bounds, scale=scaling, causal=True)[None], None
    return attend_by_piece(q, k, v, cu_seq_lens_q, cu_seq_lens_k, scaling, causal=True)[None], None


def _segmented_attention(
    kernel: str,
    own: bool,
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
    """Compute attention inside segments of one row: `query`, `key`, `value` [1, heads, T, D] -> [1, T, heads, D]."""
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = _in_one_row(query, key, value, attention_mask, dropout)
    if has_varlen_kernel(value):
        longest = int(max_length_q)
        if own and takes_images(q, k, v, longest):
            return attend_to_images(q, k, v, cu_seq_lens_q, longest, scaling)[None], None
        bounds = (cu_seq_lens_q, cu_seq_lens_q, longest, longest)
        return varlen_kernel(kernel)(q, k, v, *bounds, scale=scaling, causal=False)[None], None
    return _attend_by_length(q, k, v, cu_seq_lens_q, scaling)[None], None


def _in_one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float
) -> list[torch.Tensor]:
    """Return query, key and value in one dtype: [1, heads, T, D] -> [T, heads, D]."""
    if attention_mask is not None or dropout or query.shape[0] != 1:
        raise RuntimeError("packed rows take no attention mask and no attention dropout, and batches of one sequence")
    # Under autocast the rotary embedding leaves query and key in float32.
    # Not by [0], whose gradient is written into zeros.
    return [tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value)]


def _attend_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Call once if all segments have one length, as charts of one size have; else once for each: [T, heads, D]."""
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
