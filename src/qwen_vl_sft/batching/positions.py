"""M-RoPE positions of a row, computed from its tokens and image grids on the CPU, in the data loader's workers."""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers import MODEL_MAPPING
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qwen_vl_sft.data.encoding import Encoded


class Positions:
    """Positions by the model class's own rule, which needs its configuration and no weights.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._get_rope_index: Any = None

    def __call__(self, row: Encoded) -> torch.Tensor:
        """Positions [3, T] int64 of one row: time, height and width."""
        if self._get_rope_index is None:
            self._get_rope_index = _rope_index(self.config)
        grids = row.image_grid_thw if len(row.image_grid_thw) else None
        found, _ = self._get_rope_index(row.input_ids[None], row.mm_token_type_ids[None], image_grid_thw=grids)
        positions: torch.Tensor = found[:, 0]
        return positions

    def of_patches(self, grids: torch.Tensor) -> dict[str, Any]:
        """What the vision tower would work out from the grids, waiting for the GPU image by image.

        Returns `image_position_ids` [P, 2], `image_cu_seqlens` [I + 1] int32 and `image_max_seqlen`; for Qwen2.5-VL also
        `image_window_index` [image tokens], `image_cu_window_seqlens` [windows + 1] int32 and `image_max_window_seqlen`;
        for Qwen3-VL `image_interp_indices` [P, 4] and `image_interp_weights` [P, 4] float32 of its learned positions.
        """
        vision = self.config.vision_config
        side, boundaries = vision.spatial_merge_size, get_vision_cu_seqlens(grids)
        found = {
            "image_position_ids": get_vision_position_ids(grids, side),
            "image_cu_seqlens": boundaries,
            "image_max_seqlen": int(boundaries.diff().max()),
        }
        if self.config.model_type == "qwen2_5_vl":
            index, windows = get_vision_window_index(grids, side, vision.window_size, vision.patch_size)
            found |= {"image_window_index": index, "image_cu_window_seqlens": windows}
            found["image_max_window_seqlen"] = int(windows.diff().max())
        elif self.config.model_type == "qwen3_vl":
            # The mode is that of its vision model, which no configuration names.
            indices, weights = get_vision_interpolation_indices_and_weights(
                grids, int(vision.num_position_embeddings**0.5), "bilinear", align_corners=True, spatial_merge_size=side
            )
            found |= {"image_interp_indices": indices, "image_interp_weights": weights}
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned builds the bound methods anew.
        return {"config": self.config, "_get_rope_index": None}


def _rope_index(config: Any) -> Any:
    """The model class's `get_rope_index` bound to an object that holds the configuration alone."""
    backbone: Any = MODEL_MAPPING[type(config)]
    stub = types.SimpleNamespace(config=config)
    stub.get_vision_position_ids = types.MethodType(backbone.get_vision_position_ids, stub)
    return types.MethodType(backbone.get_rope_index, stub)
