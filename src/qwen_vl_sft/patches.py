"""Changes to the forward of a loaded model that training needs."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn


def run_frozen_vision_without_gradients(model: nn.Module) -> None:
    """Build no graph over a vision tower in which nothing trains, and have it compute as it does when it is used.

    The graph would be kept, and run backwards, because checkpointing makes its input require gradients. A tower in half
    precision needs no autocast, under which it would normalise into float32 and give other features than later.
    """
    visual = next(module for name, module in model.named_modules() if name.endswith("visual"))
    forward = visual.forward
    norms = {parameter.dtype for name, parameter in visual.named_parameters() if "norm" in name}
    autocasts = norms == {torch.float32}

    @functools.wraps(forward)
    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        device = next(visual.parameters()).device.type
        with torch.no_grad(), nullcontext() if autocasts else torch.autocast(device, enabled=False):
            return forward(*args, **kwargs)

    visual.forward = without_gradients


def count_no_placeholders_in_training(model: Any) -> None:
    """Have Qwen2-VL not count the image tokens of a batch in training: it would wait for the GPU in every micro-batch.

    The packed collator has counted them. transformers also writes the count into an error message that nobody sees. May
    go when `get_placeholder_mask` no longer reads it back.
    """
    if model.config.model_type != "qwen2_vl":
        return
    backbone, counted = model.model, model.model.get_placeholder_mask

    @functools.wraps(counted)
    def get_placeholder_mask(
        input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not backbone.training or input_ids is None:
            return counted(input_ids, inputs_embeds, *args, **kwargs)
        tokens = (backbone.config.image_token_id, backbone.config.video_token_id)
        return tuple((input_ids == token).unsqueeze(-1) for token in tokens)

    backbone.get_placeholder_mask = get_placeholder_mask


def run_vision_in_every_batch(model: Any) -> None:
    """Have a batch without images run the vision tower too, on one empty patch group whose features count for nothing.

    Where weights are split over processes, or the tower is trained on several, a process whose batch holds no image would
    leave the others waiting for it. It runs between the embeddings and the language model, as in a batch with images:
    ZeRO-3 and FSDP2 expect modules in the same order everywhere.
    """
    backbone, visual = model.model, model.model.visual
    waiting = [False]

    def look(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        cache = keywords.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        waiting[0] = begins and keywords.get("pixel_values") is None and keywords.get("inputs_embeds") is None

    def add_nothing(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not waiting[0]:
            return None
        waiting[0] = False
        embedded = keywords["inputs_embeds"]
        side, patches = visual.spatial_merge_size, visual.patch_embed
        values = patches.in_channels * patches.temporal_patch_size * patches.patch_size**2
        pixels = torch.zeros(side * side, values, device=embedded.device)
        grid = torch.tensor([[1, side, side]], device=embedded.device)
        found = backbone.get_image_features(pixels, grid, return_dict=True)
        features = [
            *found.pooler_output,
            *(part for layer in getattr(found, "deepstack_features", []) for part in layer),
        ]
        nothing = 0.0 * sum(feature.sum() for feature in features).to(embedded.dtype)
        return arguments, {**keywords, "inputs_embeds": embedded + nothing}

    backbone.register_forward_pre_hook(look, with_kwargs=True)
    backbone.language_model.register_forward_pre_hook(add_nothing, with_kwargs=True)


def has_tied_embeddings(model: Any) -> bool:
    """Whether the output head is the input embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def call_tied_head_after_backbone(model: Any) -> None:
    """Under FSDP2, call the output head on nothing whenever the backbone has run.

    accelerate puts tied embeddings and the head into one FSDP group, which gathers its weights when its first layer
    runs and is ready to do so again only when all of them have run. TRL's fused head reads the head's weight and never
    calls it, so the second forward would meet weights that are split. May go when TRL's `add_fused_lm_head` runs the
    head's hooks.
    """

    def call_head(backbone: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if keywords.get("use_cache"):
            return  # while generating, the model's own forward calls the head
        with torch.no_grad():
            model.get_output_embeddings()(output.last_hidden_state[:, :0])

    model.model.register_forward_hook(call_head, with_kwargs=True)
