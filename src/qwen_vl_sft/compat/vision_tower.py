"""Run a Qwen-VL vision tower without gradients where nothing in it trains, and in every batch where processes wait."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.compat.registry import Patch
from qwen_vl_sft.families.registry import family_of

_BEFORE_PREFILL = "_prepare_multimodal_encoder_kwargs_for_generation"


def run_frozen_vision_without_gradients(model: nn.Module) -> None:
    """Build no graph over a vision tower in which nothing trains, and have it compute as it does when it is used.

    The graph would be kept, and run backwards, because checkpointing makes its input require gradients. A tower in half
    precision needs no autocast, under which it would normalise into float32 and give other features than later.
    """
    _, visual = family_of(model.config).tower_of(model)
    forward = visual.forward
    norms = {parameter.dtype for name, parameter in visual.named_parameters() if "norm" in name}
    autocasts = norms == {torch.float32}

    @functools.wraps(forward)
    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        device = next(visual.parameters()).device.type
        with torch.no_grad(), nullcontext() if autocasts else torch.autocast(device, enabled=False):
            return forward(*args, **kwargs)

    visual.forward = without_gradients


def run_frozen_blocks_without_gradients(model: nn.Module) -> None:
    """Build no graph over the blocks of a vision tower of which nothing but its mergers trains.

    As with a tower that is frozen as a whole, checkpointing makes its input require gradients. Mergers of deeper layers
    take what leaves a block, as the last one does.
    """
    _, visual = family_of(model.config).tower_of(model)
    for block in visual.blocks:
        block.forward = torch.no_grad()(block.forward)


def run_vision_in_every_batch(model: Any) -> None:
    """Have a batch without images run the vision tower too, on one empty patch group whose features count for nothing.

    Where weights are split over processes, or the tower is trained on several, a process whose batch holds no image would
    leave the others waiting for it. ZeRO-3 would move a tower without a gradient by its last one again. It runs between
    the embeddings and the language model, as in a batch with images: ZeRO-3 and FSDP2 expect modules in the same order
    everywhere. Batches that bring features run it nowhere.
    """
    backbone, family = model.model, family_of(model.config)
    _, visual = family.tower_of(model)
    waiting = [False]

    def run_on_nothing(device: torch.device) -> Any:
        side, patches = visual.spatial_merge_size, visual.patch_embed
        values = patches.in_channels * patches.temporal_patch_size * patches.patch_size**2
        pixels = torch.zeros(side * side, values, device=device)
        grid = torch.tensor([[1, side, side]], device=device)
        found = backbone.get_image_features(pixels, grid, return_dict=True)
        return 0.0 * sum(feature.sum() for layer in family.feature_layers(found) for feature in layer)

    def look(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        brings = any(keywords.get(name) is not None for name in ("pixel_values", "inputs_embeds", "mm_encoder_outputs"))
        waiting[0] = begins and not brings

    def add_nothing(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not waiting[0]:
            return None
        waiting[0] = False
        embedded = keywords["inputs_embeds"]
        nothing = run_on_nothing(embedded.device).to(embedded.dtype)
        return arguments, {**keywords, "inputs_embeds": embedded + nothing}

    backbone.register_forward_pre_hook(look, with_kwargs=True)
    backbone.language_model.register_forward_pre_hook(add_nothing, with_kwargs=True)
    if hasattr(model, _BEFORE_PREFILL):
        # `generate` runs the tower ahead of the model's own forward.
        encode_images = getattr(model, _BEFORE_PREFILL)

        def encode_images_or_nothing(model_kwargs: dict[str, Any]) -> Any:
            if model_kwargs.get("pixel_values") is None:
                run_on_nothing(model.device)
            return encode_images(model_kwargs)

        setattr(model, _BEFORE_PREFILL, encode_images_or_nothing)


PATCHES = (
    Patch(
        name="run_frozen_vision_without_gradients",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Gradient checkpointing keeps the graph of a frozen vision tower and runs it backwards.",
        applied_by="compat.vision_tower.run_frozen_vision_without_gradients",
        relies_on={"model.model.visual.forward": ("hidden_states", "grid_thw")},
    ),
    Patch(
        name="run_frozen_blocks_without_gradients",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Gradient checkpointing keeps the graph of frozen blocks in front of a merger that trains.",
        applied_by="compat.vision_tower.run_frozen_blocks_without_gradients",
        relies_on={"model.model.visual.blocks.0.forward": ("hidden_states",)},
    ),
    Patch(
        name="run_vision_in_every_batch",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="A process whose batch has no image leaves the others waiting where the vision tower is split or trains.",
        applied_by="compat.vision_tower.run_vision_in_every_batch",
        relies_on={
            "model.model.get_image_features": ("pixel_values", "image_grid_thw"),
            f"model.{_BEFORE_PREFILL}": ("model_kwargs",),
        },
    ),
)
