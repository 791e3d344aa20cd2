"""Qwen3-VL: features of deeper vision layers (DeepStack) and position embeddings that are interpolated.

Some blocks of the tower have a merger of their own, whose features are added to image tokens behind the first layers
of the language model.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.families.base import (
    ChatFormat,
    FeatureLayers,
    ModelFamily,
    PackedLayout,
    interpolated_image_inputs,
    plain_boxes,
)
from qwen_vl_sft.families.flops import ForwardFlops, dense_language_flops, vision_flops


def _flops(config: Any, packed: bool) -> ForwardFlops:
    return ForwardFlops(**dense_language_flops(config, packed), **tower_flops(config))


def tower_flops(config: Any) -> dict[str, float]:
    """Count the vision tower and its mergers, as fields of `ForwardFlops`."""
    vision = config.vision_config
    mlp = 2 * vision.hidden_size * vision.intermediate_size
    return vision_flops(config, vision.hidden_size, mlp, mergers=_layers(config))


def _layers(config: Any) -> int:
    return 1 + len(config.vision_config.deepstack_visual_indexes or ())


def _packed_entries(config: Any, layout: PackedLayout) -> dict[str, Any]:
    """Return `visual_positions` [image tokens], where the features of deeper layers are added."""
    return {"visual_positions": layout.visual_positions} if len(layout.visual_positions) else {}


def _prepare_packing(model: Any) -> None:
    """Have the language model take `visual_positions`; from a mask it would wait for the GPU in each of its layers."""
    language_model = model.model.language_model
    by_mask = type(language_model)._deepstack_process

    def add(
        language_model: Any, hidden_states: torch.Tensor, where: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        if where.dtype == torch.bool:
            return by_mask(language_model, hidden_states, where, features)
        return hidden_states.index_add(1, where, features.to(hidden_states.dtype)[None])

    def take(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        positions = keywords.pop("visual_positions", None)
        return None if positions is None else (arguments, {**keywords, "visual_pos_masks": positions})

    # Bound: in a copy of the model it is the copy's.
    language_model._deepstack_process = types.MethodType(add, language_model)
    language_model.register_forward_pre_hook(take, with_kwargs=True)


def _feature_layers(output: Any) -> FeatureLayers:
    return [output.pooler_output, *(output.deepstack_features or ())]


def _feature_output(layers: FeatureLayers) -> Any:
    last, *deeper = layers
    return types.SimpleNamespace(pooler_output=tuple(last), deepstack_features=[tuple(layer) for layer in deeper])


FAMILY = ModelFamily(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    flops=_flops,
    mergers=("visual.merger", "visual.deepstack_merger_list"),
    # https://github.com/QwenLM/Qwen3-VL/issues/1486, and its cookbook 2d_grounding.ipynb
    chat=ChatFormat(boxes=plain_boxes("norm1000")),
    patch_inputs=interpolated_image_inputs,
    packed_entries=_packed_entries,
    prepare_packing=_prepare_packing,
    feature_layers=_feature_layers,
    feature_output=_feature_output,
    count_feature_layers=_layers,
)
