"""Useful floating-point operations of a training step, and the share of a GPU's peak that they make."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# Dense bf16 peak in FLOP/s by words of the device's name, from NVIDIA's datasheets (without sparsity).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, None when it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass
class BatchStats:
    """What the model had to compute: sums over samples, whatever the padding.

    `tokens` and `tokens_squared` (a sample's tokens squared, for attention), `learned` tokens, `images`, `patches` and
    `patches_squared` (an image's patches squared); `rows`, and those `skipped` that could not be read.
    """

    tokens: int = 0
    tokens_squared: int = 0
    learned: int = 0
    images: int = 0
    patches: int = 0
    patches_squared: int = 0
    rows: int = 0
    skipped: int = 0

    def __add__(self, other: BatchStats) -> BatchStats:
        return BatchStats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of training on some work, counted as 2 a multiply-add over the matrix products that must be done.

    A frozen layer costs its forward and the gradient of its input; a trained one also the gradient of its weights, and so
    do attention's products, both factors of which take gradients. The adapter itself is left out, and so is all
    recomputation. Attention is counted over the causal half.
    """

    per_token: float
    per_token_squared: float
    per_learned: float
    per_patch: float
    per_patch_in_window: float
    per_patch_squared: float
    per_merged_patch: float
    language_passes: float
    vision_passes: float
    merger_passes: float

    @classmethod
    def of(cls, config: Any, peft: bool, trained: Collection[str], packed: bool = False) -> FlopCounter:
        """Count from a Qwen-VL configuration: `peft` when only adapters train, `trained` the parts in which something does.

        Nothing is computed backwards before the first of vision, merger and language that trains. `packed` batches take
        the last layer's MLP for learned tokens alone (`compat.packed_batches`).
        """
        text, vision = config.get_text_config(), config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
        attention, mlp = text.hidden_size * (2 * queries + 2 * keys), 3 * text.hidden_size * text.intermediate_size
        late, backward = mlp if packed else 0, 2 if peft else 3
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        gated = 3 if config.model_type == "qwen2_5_vl" else 2
        block = 4 * width * width + gated * width * inner
        merged = width * vision.spatial_merge_size**2
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        merger = mergers * (merged * merged + merged * text.hidden_size) / vision.spatial_merge_size**2
        # Qwen2.5-VL: in most layers a patch sees its window alone. Those at the edge of an image count as whole ones.
        full = len(vision.fullatt_block_indexes) if hasattr(vision, "fullatt_block_indexes") else vision.depth
        window = (vision.window_size // vision.patch_size) ** 2 if full < vision.depth else 0
        return cls(
            per_token=2 * (text.num_hidden_layers * (attention + mlp) - late),
            per_token_squared=2 * text.num_hidden_layers * queries,
            per_learned=2 * (text.hidden_size * text.vocab_size + late),
            per_patch=2 * vision.depth * block,
            per_patch_in_window=4 * (vision.depth - full) * width * window,
            per_patch_squared=4 * full * width,
            per_merged_patch=2 * merger,
            language_passes=backward,
            vision_passes=backward if "vision" in trained else 1,
            merger_passes=1 if set(trained) <= {"language"} else backward,
        )

    def flops(self, work: BatchStats) -> float:
        """FLOPs of forward and backward over `work`."""
        language = self.per_token * work.tokens + self.per_learned * work.learned
        seen = self.per_patch_in_window * work.patches + self.per_patch_squared * work.patches_squared
        return (
            language * self.language_passes
            + self.per_token_squared * work.tokens_squared * _attention_passes(self.language_passes)
            + self.per_patch * work.patches * self.vision_passes
            + seen * _attention_passes(self.vision_passes)
            + self.per_merged_patch * work.patches * self.merger_passes
        )


def _attention_passes(passes: float) -> float:
    """Those of products without weights, where layers with weights have so many."""
    return 1 if passes == 1 else 3
