"""Qwen2-VL: M-RoPE over images of any size, attention of each patch to its whole image."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.families.flops import ForwardFlops, dense_language_flops, vision_flops


def _flops(config: Any, packed: bool) -> ForwardFlops:
    width = config.vision_config.embed_dim
    mlp = 2 * width * int(width * config.vision_config.mlp_ratio)
    return ForwardFlops(**dense_language_flops(config, packed), **vision_flops(config, width, mlp))


FAMILY = ModelFamily(model_type="qwen2_vl", name="Qwen2-VL", flops=_flops)
