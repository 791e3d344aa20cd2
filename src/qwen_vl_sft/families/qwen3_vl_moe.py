"""Qwen3-VL with a mixture of experts in the layers of its language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_vl_sft.families import qwen3_vl
from qwen_vl_sft.families.base import NO_LINEAR_ATTENTION
from qwen_vl_sft.families.experts import Experts, sparse_weights
from qwen_vl_sft.families.flops import ForwardFlops, language_flops


def _flops(config: Any, packed: bool) -> ForwardFlops:
    text = config.get_text_config()
    dense = 3 * text.hidden_size * text.intermediate_size
    mlps = [sparse_weights(text) if _is_sparse(text, layer) else dense for layer in range(text.num_hidden_layers)]
    return ForwardFlops(**language_flops(config, packed, mlps), **qwen3_vl.tower_flops(config))


def _is_sparse(text: Any, layer: int) -> bool:
    return layer not in text.mlp_only_layers and text.num_experts > 0 and (layer + 1) % text.decoder_sparse_step == 0


FAMILY = replace(
    qwen3_vl.FAMILY,
    model_type="qwen3_vl_moe",
    name="Qwen3-VL-MoE",
    flops=_flops,
    experts=Experts(),
    unfit_kernels={**NO_LINEAR_ATTENTION, "swiglu": "its MLPs are experts, which are multiplied in groups"},
)
