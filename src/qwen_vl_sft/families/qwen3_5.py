"""Qwen3.5, and Qwen3.6 and Qwen3.8 of the same architecture: three of four layers of the language model are linear attention.

The vision tower is Qwen3-VL's without the features of deeper layers. Full attention has a gate, rotates a quarter of each
head, and norms multiply by weight + 1.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.families.base import (
    NO_EXPERTS,
    ChatFormat,
    ModelFamily,
    PackedLayout,
    RopeFunctions,
    interpolated_image_inputs,
    plain_boxes,
)
from qwen_vl_sft.families.flops import ForwardFlops, vision_flops
from qwen_vl_sft.families.gated_delta_net import CHUNK, PIECES, pieces_of, take_pieces
from qwen_vl_sft.families.gated_delta_states import DeltaStates, state_bytes

LINEAR = "linear_attention"
LINEAR_LAYER = "GatedDeltaNet"
# Qwen3.5's template drops the thoughts of earlier answers, empty ones too; Qwen3.6's has the option to keep them.
_DROPS_THOUGHTS = "{%- if loop.index0 > ns.last_query_index %}"
_MAY_KEEP_THOUGHTS = (
    "{%- if (preserve_thinking is defined and preserve_thinking is true) or (loop.index0 > ns.last_query_index) %}"
)


def _flops(config: Any, packed: bool) -> ForwardFlops:
    text = config.get_text_config()
    return hybrid_flops(config, packed, 3 * text.hidden_size * text.intermediate_size)


def hybrid_flops(config: Any, packed: bool, mlp: int) -> ForwardFlops:
    """Count a model whose layers multiply a token with `mlp` weights behind their attention."""
    text, vision = config.get_text_config(), config.vision_config
    linear = sum(kind == LINEAR for kind in text.layer_types)
    full = text.num_hidden_layers - linear
    queries, keys = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    attention = text.hidden_size * (3 * queries + 2 * keys)  # the queries' layer also gives their gate
    late = mlp if packed and text.layer_types[-1] != LINEAR else 0
    tower = vision_flops(config, vision.hidden_size, 2 * vision.hidden_size * vision.intermediate_size)
    weights = linear * _delta_net_weights(text) + full * attention + text.num_hidden_layers * mlp - late
    return ForwardFlops(
        per_token=2 * weights,
        per_token_products=linear * _delta_rule_flops(text),
        per_token_squared=2 * full * queries,
        per_target_token=2 * (text.hidden_size * text.vocab_size + late),
        **tower,
    )


def _delta_net_weights(text: Any) -> int:
    """Count the weights of a linear-attention layer that each token is multiplied with, those of the convolution too."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    heads, values = text.linear_num_value_heads, text.linear_num_value_heads * text.linear_value_head_dim
    mixed = 2 * keys + values
    return text.hidden_size * (mixed + 2 * values + 2 * heads) + mixed * text.linear_conv_kernel_dim


def _delta_rule_flops(text: Any) -> int:
    """Count the FLOPs of the chunked gated delta rule of a token, with the causal half of what is computed in a chunk.

    A head of K x V values: three products with the state, and within the chunk key with key, query with key, the
    triangular system for K + V right sides, and the attention.
    """
    k, v = text.linear_key_head_dim, text.linear_value_head_dim
    return int(text.linear_num_value_heads * (6 * k * v + CHUNK * (3 * k + 2 * v)))


def _packed_entries(config: Any, layout: PackedLayout) -> dict[str, Any]:
    return {PIECES: pieces_of(layout, config.get_text_config().linear_conv_kernel_dim)}


def _state_bytes(config: Any, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    return state_bytes(text, sum(kind == LINEAR for kind in text.layer_types), dtype)


def _adapt_template(template: str) -> str:
    """Give Qwen3.5's chat template Qwen3.6's option `preserve_thinking`, its only difference to it in conversations."""
    return template if "preserve_thinking" in template else template.replace(_DROPS_THOUGHTS, _MAY_KEEP_THOUGHTS)


FAMILY = ModelFamily(
    model_type="qwen3_5",
    name="Qwen3.5",
    flops=_flops,
    # https://github.com/QwenLM/Qwen3.8-Flash-Next/issues/4
    chat=ChatFormat(
        template_options={"preserve_thinking": True, "enable_thinking": False}, boxes=plain_boxes("norm1000")
    ),
    patch_inputs=interpolated_image_inputs,
    packed_entries=_packed_entries,
    prepare_packing=lambda model: take_pieces(model, LINEAR_LAYER),
    row_states=lambda model, slots, dtype: DeltaStates(model, LINEAR_LAYER, slots, dtype),
    state_bytes=_state_bytes,
    rope_functions=RopeFunctions(whole_heads=False),
    unfit_kernels=NO_EXPERTS,
    norm_offset=1.0,
    # Of these two a head has one output: 4-bit would save nothing, and the decay of its state is an exponential of one.
    keep_16bit=("lm_head", "in_proj_a", "in_proj_b"),
    unloaded_weights=("mtp.",),
    adapt_template=_adapt_template,
    slow="linear attention, in PyTorch's own operations: exact, slow on a GPU",
    thinking=True,
    # Its layers compute two rounds of pieces, the second from the states of the first.
    shared_openings=False,
)
