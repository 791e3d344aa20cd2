"""Dimensions of released models, from their config.json on the Hub: used where that file is not on this machine."""

from __future__ import annotations

from typing import Any


def _released(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, keys: int, words: int, tied: bool, **vision: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "vision_config": vision,
    }


_TOWER_2_5 = {"hidden_size": 1280}
_LARGE_3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": (8, 16, 24)}
_SMALL_3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": (5, 11, 17)}
_SPARSE_3 = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
_HYBRID = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_SPARSE_3_5 = {
    **_HYBRID,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

RELEASED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _released("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": _released("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2-VL-72B-Instruct": _released("qwen2_vl", 8192, 29568, 80, 64, 8, 152064, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _released("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, **_TOWER_2_5),
    "Qwen/Qwen2.5-VL-7B-Instruct": _released("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, **_TOWER_2_5),
    "Qwen/Qwen2.5-VL-32B-Instruct": _released(
        "qwen2_5_vl", 5120, 27648, 64, 40, 8, 152064, False, intermediate_size=3456, **_TOWER_2_5
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": _released(
        "qwen2_5_vl", 8192, 29568, 80, 64, 8, 152064, False, intermediate_size=3456, **_TOWER_2_5
    ),
    "Qwen/Qwen3-VL-2B-Instruct": _released("qwen3_vl", 2048, 6144, 28, 16, 8, 151936, True, **_SMALL_3),
    "Qwen/Qwen3-VL-4B-Instruct": _released("qwen3_vl", 2560, 9728, 36, 32, 8, 151936, True, **_SMALL_3),
    "Qwen/Qwen3-VL-8B-Instruct": _released("qwen3_vl", 4096, 12288, 36, 32, 8, 151936, False, **_LARGE_3),
    "Qwen/Qwen3-VL-32B-Instruct": _released("qwen3_vl", 5120, 25600, 64, 64, 8, 151936, False, **_LARGE_3),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": {
        **_released("qwen3_vl_moe", 2048, 6144, 48, 32, 4, 151936, False, **_LARGE_3),
        **_SPARSE_3,
        "moe_intermediate_size": 768,
    },
    "Qwen/Qwen3-VL-235B-A22B-Instruct": {
        **_released("qwen3_vl_moe", 4096, 12288, 94, 64, 4, 151936, False, **_LARGE_3),
        **_SPARSE_3,
        "moe_intermediate_size": 1536,
    },
    "Qwen/Qwen3.5-9B": {**_released("qwen3_5", 4096, 12288, 32, 16, 4, 248320, False), **_HYBRID},
    "Qwen/Qwen3.8-27B": {
        **_released("qwen3_5", 5120, 17408, 64, 24, 4, 248320, False),
        **_HYBRID,
        "linear_num_value_heads": 48,
    },
    # Its MLPs are experts alone.
    "Qwen/Qwen3.5-35B-A3B": {**_released("qwen3_5_moe", 2048, 0, 40, 16, 2, 248320, False), **_SPARSE_3_5},
}

_ROTATED_3_5 = {
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
# Of a head's rotated values, those that turn with time, height and width, and how fast.
_ROTATED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "qwen2_5_vl": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "qwen3_vl": {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "qwen3_vl_moe": {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "qwen3_5": _ROTATED_3_5,
    "qwen3_5_moe": _ROTATED_3_5,
}


def released_config(name: str) -> dict[str, Any]:
    """Return what transformers' configuration of a model of `RELEASED` takes, such as for one with random weights."""
    text = dict(RELEASED[name])
    kind, vision, tied = text.pop("model_type"), dict(text.pop("vision_config")), text.pop("tie_word_embeddings")
    vision["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"] = text["hidden_size"]
    vision = {name: [*value] if isinstance(value, tuple) else value for name, value in vision.items()}
    text["rope_parameters"] = {"rope_type": "default", **_ROTATED[kind]}
    if kind == "qwen3_5_moe":
        text.pop("intermediate_size")
    return {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
