"""Qwen3.5 with a mixture of experts in each layer, and one more expert that every token goes through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_vl_sft.families import qwen3_5
from qwen_vl_sft.families.experts import Experts, sparse_weights
from qwen_vl_sft.families.flops import ForwardFlops


def _flops(config: Any, packed: bool) -> ForwardFlops:
    text = config.get_text_config()
    shared = 3 * text.hidden_size * text.shared_expert_intermediate_size + text.hidden_size
    return qwen3_5.hybrid_flops(config, packed, sparse_weights(text) + shared)


FAMILY = replace(
    qwen3_5.FAMILY,
    model_type="qwen3_5_moe",
    name="Qwen3.5-MoE",
    flops=_flops,
    experts=Experts(),
    unfit_kernels={},
    # The gate of the shared expert has one output, which 4 bits would round coarsely and save nothing.
    keep_16bit=(*qwen3_5.FAMILY.keep_16bit, "shared_expert_gate"),
)
