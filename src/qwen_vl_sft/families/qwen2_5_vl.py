"""Qwen2.5-VL: in most blocks of its vision tower a patch attends only within its window."""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from qwen_vl_sft.families.base import ChatFormat, ModelFamily, image_inputs, plain_boxes
from qwen_vl_sft.families.flops import ForwardFlops, dense_language_flops, vision_flops


def _flops(config: Any, packed: bool) -> ForwardFlops:
    vision = config.vision_config
    mlp = 3 * vision.hidden_size * vision.intermediate_size  # gated
    full = sum(index < vision.depth for index in vision.fullatt_block_indexes)
    window = (vision.window_size // vision.patch_size) ** 2
    language = dense_language_flops(config, packed)
    return ForwardFlops(**language, **vision_flops(config, vision.hidden_size, mlp, full=full, window=window))


def _patch_inputs(config: Any, grids: torch.Tensor) -> dict[str, Any]:
    """Add `image_window_index` [image tokens], `image_cu_window_seqlens` [windows + 1], `image_max_window_seqlen`."""
    vision = config.vision_config
    index, windows = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
    return {
        **image_inputs(config, grids),
        "image_window_index": index,
        "image_cu_window_seqlens": windows,
        "image_max_window_seqlen": int(windows.diff().max()),
    }


FAMILY = ModelFamily(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    flops=_flops,
    # https://github.com/QwenLM/Qwen3-VL/issues/721 and issues/733: its authors on coordinates and special tokens.
    chat=ChatFormat(boxes=plain_boxes("resized")),
    patch_inputs=_patch_inputs,
)
