"""Read a model's dimensions from its config.json, without a training library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.shape import DeltaShape, ExpertsShape, ModelShape, TextShape, VisionShape
from qwen_vl_sft.families.untrained import unknown_model

_LINEAR = "linear_attention"


def read_shape(config: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """Read the dimensions from what a config.json holds. Raises `UserError` for a model that is not known here."""
    kind = config.get("model_type")
    if kind not in _VISION:
        raise UserError(unknown_model(source, kind, f"the plan knows {', '.join(_VISION)}"))
    text: Mapping[str, Any] = {**config, **config.get("text_config", {})}
    vision: Mapping[str, Any] = config.get("vision_config", {})
    try:
        found = ModelShape(kind, _text(config, text), _VISION[kind](vision))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: has no usable {error}; give the model's own config.json") from None
    return found


def _text(config: Mapping[str, Any], text: Mapping[str, Any]) -> TextShape:
    kind = config["model_type"]
    hybrid, sparse = kind in ("qwen3_5", "qwen3_5_moe"), kind.endswith("_moe")
    third = kind in ("qwen3_vl", "qwen3_vl_moe") or hybrid
    hidden, heads, layers = (int(text[name]) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # Heads of Qwen3-VL are as wide as its configuration says, 128 unless it does.
    width = int(text.get("head_dim") or (128 if kind == "qwen3_vl" or hybrid else hidden // heads))
    tied = config.get("tie_word_embeddings", False)
    if not sparse:  # whose text configuration says that they are, and means nothing by it
        tied = tied or text.get("tie_word_embeddings", False)
    return TextShape(
        hidden=hidden,
        # Where every MLP is of experts, its width may be missing.
        mlp=int(text.get("intermediate_size") or 0) if sparse and hybrid else int(text["intermediate_size"]),
        layers=layers,
        heads=heads,
        head_width=width,
        queries=heads * width,
        keys=int(text.get("num_key_value_heads") or heads) * width,
        vocabulary=int(text["vocab_size"]),
        tied=bool(tied),
        biased=bool(text.get("attention_bias", False)) if third else True,
        head_norms=third,
        gated=hybrid,
        delta=_delta(text) if hybrid else None,
        experts=_experts(text, layers, shared=hybrid) if sparse else None,
    )


def _experts(text: Mapping[str, Any], layers: int, shared: bool) -> ExpertsShape | None:
    count = int(text.get("num_experts") or text["num_local_experts"])
    every, dense = int(text.get("decoder_sparse_step") or 1), set(text.get("mlp_only_layers") or ())
    sparse = [layer not in dense and (layer + 1) % every == 0 for layer in range(layers)]
    if not any(sparse):
        return None
    return ExpertsShape(
        layers=sum(sparse),
        last=sparse[-1],
        count=count,
        chosen=int(text["num_experts_per_tok"]),
        mlp=int(text["moe_intermediate_size"]),
        shared=int(text["shared_expert_intermediate_size"]) if shared else 0,
    )


def _delta(text: Mapping[str, Any]) -> DeltaShape:
    layers, every = int(text["num_hidden_layers"]), int(text.get("full_attention_interval") or 4)
    kinds = text.get("layer_types") or ["" if (place + 1) % every == 0 else _LINEAR for place in range(layers)]
    key_width = int(text["linear_key_head_dim"])
    return DeltaShape(
        layers=sum(kind == _LINEAR for kind in kinds),
        last=kinds[-1] == _LINEAR,
        keys=int(text["linear_num_key_heads"]) * key_width,
        heads=int(text["linear_num_value_heads"]),
        key_width=key_width,
        value_width=int(text["linear_value_head_dim"]),
        kernel=int(text["linear_conv_kernel_dim"]),
    )


def _qwen2_vl(vision: Mapping[str, Any]) -> VisionShape:
    width, depth = int(vision.get("embed_dim", 1280)), int(vision.get("depth", 32))
    return VisionShape(
        depth=depth,
        width=width,
        mlp=int(width * vision.get("mlp_ratio", 4)),
        gated=False,
        mergers=1,
        full=depth,
        window=0,
        layer_norms=True,
        positions=0,
        patch_bias=False,
        activation="quick_gelu",
        mlp_names=("fc1", "fc2"),
        merger_names=("mlp.0", "mlp.2"),
        **_patches(vision, 14),
    )


def _qwen2_5_vl(vision: Mapping[str, Any]) -> VisionShape:
    depth, patch = int(vision.get("depth", 32)), int(vision.get("patch_size", 14))
    full = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
    return VisionShape(
        depth=depth,
        width=int(vision.get("hidden_size", 3584)),
        mlp=int(vision.get("intermediate_size", 3420)),
        gated=True,
        mergers=1,
        full=sum(index < depth for index in full),
        window=(int(vision.get("window_size", 112)) // patch) ** 2,
        layer_norms=False,
        positions=0,
        patch_bias=False,
        activation="silu",
        mlp_names=("gate_proj", "up_proj", "down_proj"),
        merger_names=("mlp.0", "mlp.2"),
        **_patches(vision, 14),
    )


def _qwen3_vl(vision: Mapping[str, Any]) -> VisionShape:
    depth = int(vision.get("depth", 27))
    deeper = vision.get("deepstack_visual_indexes", (8, 16, 24))
    return VisionShape(
        depth=depth,
        width=int(vision.get("hidden_size", 1152)),
        mlp=int(vision.get("intermediate_size", 4304)),
        gated=False,
        mergers=1 + len(deeper or ()),
        full=depth,
        window=0,
        layer_norms=True,
        positions=int(vision.get("num_position_embeddings", 2304)),
        patch_bias=True,
        activation="gelu",
        mlp_names=("linear_fc1", "linear_fc2"),
        merger_names=("linear_fc1", "linear_fc2"),
        **_patches(vision, 16),
    )


def _qwen3_5(vision: Mapping[str, Any]) -> VisionShape:
    """Read the tower, which is Qwen3-VL's without the features of deeper layers."""
    return _qwen3_vl({**vision, "deepstack_visual_indexes": ()})


def _patches(vision: Mapping[str, Any], patch: int) -> dict[str, int]:
    patch = int(vision.get("patch_size", patch))
    channels = int(vision.get("in_channels", 3))
    return {
        "pixels": channels * int(vision.get("temporal_patch_size", 2)) * patch * patch,
        "patch": patch,
        "merge": int(vision.get("spatial_merge_size", 2)),
    }


_VISION: dict[str, Callable[[Mapping[str, Any]], VisionShape]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "qwen3_vl_moe": _qwen3_vl,
    "qwen3_5_moe": _qwen3_5,
}
