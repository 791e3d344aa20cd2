"""FLOPs of one forward, counted from a configuration, for families to put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass (2 per multiply-add), by the quantity that they are proportional to.

    Products with trained weights cost three times the forward pass in training; products of two activations
    (`..._products`) do too once a gradient passes. Attention is counted over its causal half.

    Attributes:
        per_token: layers of the language model.
        per_token_products: products of activations that grow with the tokens: attention of linear kind.
        per_token_squared: attention over a sample's tokens squared.
        per_target_token: the output head, and what else is computed for target tokens alone.
        per_patch: layers of the vision tower.
        per_patch_products: attention in windows of a fixed number of patches.
        per_patch_squared: attention over an image's patches squared.
        per_merged_patch: mergers, by patch.
    """

    per_token: float
    per_token_squared: float
    per_target_token: float
    per_patch: float
    per_patch_squared: float
    per_merged_patch: float
    per_token_products: float = 0
    per_patch_products: float = 0


def dense_language_flops(config: Any, packed: bool) -> dict[str, float]:
    """Count a language model of attention and gated MLPs, as fields of `ForwardFlops`.

    `packed` batches take the last layer's MLP for target tokens alone.
    """
    text = config.get_text_config()
    return language_flops(config, packed, [3 * text.hidden_size * text.intermediate_size] * text.num_hidden_layers)


def language_flops(config: Any, packed: bool, mlps: Sequence[int]) -> dict[str, float]:
    """Count a language model of attention and what stands behind it, as fields of `ForwardFlops`.

    `mlps` are for each layer the weights behind attention that a token is multiplied with. `packed` batches take those of
    the last layer for target tokens alone.
    """
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    attention = text.hidden_size * (2 * queries + 2 * keys)
    late = mlps[-1] if packed else 0
    return {
        "per_token": 2 * (text.num_hidden_layers * attention + sum(mlps) - late),
        "per_token_squared": 2 * text.num_hidden_layers * queries,
        "per_target_token": 2 * (text.hidden_size * text.vocab_size + late),
    }


def vision_flops(
    config: Any, width: int, mlp: int, full: int | None = None, window: int = 0, mergers: int = 1
) -> dict[str, float]:
    """Count a vision tower and its mergers, as fields of `ForwardFlops`.

    Args:
        config: the model's configuration.
        width: values of a patch between blocks.
        mlp: weights of a block's MLP.
        full: blocks whose attention sees the whole image; None for all. The others see `window` patches, also at the
            edge of an image, where a window has fewer.
        window: patches of a window.
        mergers: number of mergers.
    """
    vision = config.vision_config
    full = vision.depth if full is None else full
    merged = width * vision.spatial_merge_size**2
    merger = mergers * (merged * merged + merged * config.get_text_config().hidden_size) / vision.spatial_merge_size**2
    return {
        "per_patch": 2 * vision.depth * (4 * width * width + mlp),
        "per_patch_products": 4 * (vision.depth - full) * width * window,
        "per_patch_squared": 4 * full * width,
        "per_merged_patch": 2 * merger,
    }
