"""M-RoPE positions and inputs of the vision tower, computed on the CPU in the data loader's workers."""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.data.encoding import Encoded
from qwen_vl_sft.families.base import PackedLayout
from qwen_vl_sft.families.registry import family_of


class Positions:
    """Works out what a model would from tokens and image grids, by its family's rules; it needs no weights.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.family = family_of(config)
        self._get_rope_index: Any = None

    def __call__(self, row: Encoded) -> torch.Tensor:
        """Return the M-RoPE positions [3, T] int64 of one row: time, height and width."""
        if self._get_rope_index is None:
            self._get_rope_index = self.family.rope_index(self.config)
        grids = row.image_grid_thw if len(row.image_grid_thw) else None
        found, _ = self._get_rope_index(row.input_ids[None], row.mm_token_type_ids[None], image_grid_thw=grids)
        positions: torch.Tensor = found[:, 0]
        return positions

    def patch_inputs(self, grids: torch.Tensor) -> dict[str, Any]:
        """Return what the vision tower would work out from `grids` [I, 3], see `ModelFamily.patch_inputs`."""
        return self.family.patch_inputs(self.config, grids)

    def packed_entries(self, layout: PackedLayout) -> dict[str, Any]:
        """Return the additional entries of the family's packed batches (`ModelFamily.packed_entries`)."""
        return self.family.packed_entries(self.config, layout)

    def __reduce__(self) -> tuple[type[Positions], tuple[Any]]:
        # A spawned worker rebuilds the bound functions.
        return Positions, (self.config,)
