"""Changes to the forward of a loaded model that training needs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from trl.trainer import utils as trl_utils

_BEFORE_PREFILL = "_prepare_multimodal_encoder_kwargs_for_generation"


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


def run_frozen_blocks_without_gradients(model: nn.Module) -> None:
    """Build no graph over the blocks of a vision tower of which nothing but its mergers trains.

    As with a tower that is frozen as a whole, checkpointing makes its input require gradients. Mergers of deeper layers
    take what leaves a block, as the last one does.
    """
    for name, block in model.named_modules():
        if re.search(r"(^|\.)visual\.blocks\.\d+$", name):
            block.forward = torch.no_grad()(block.forward)


def count_no_placeholders_in_training(model: Any) -> None:
    """Have a model not count the image tokens of a batch in training: it would wait for the GPU in every micro-batch.

    The packed collator has counted them. transformers also writes the count into an error message that nobody sees. May
    go when `get_placeholder_mask` no longer reads it back.
    """
    counted = type(model.model).get_placeholder_mask

    @functools.wraps(counted)
    def get_placeholder_mask(
        backbone: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not backbone.training or input_ids is None:
            return counted(backbone, input_ids, inputs_embeds, *args, **kwargs)
        tokens = (backbone.config.image_token_id, backbone.config.video_token_id)
        return tuple((input_ids == token).unsqueeze(-1) for token in tokens)

    model.model.get_placeholder_mask = MethodType(get_placeholder_mask, model.model)


def take_packed_batches(model: Any) -> None:
    """Have a model take batches of the packed collator; all others go on as before.

    `image_places`, a list, names for each image that is shown the one of `pixel_values` that it is: the vision tower runs
    once on each, and its gradients add up. `image_features` [image tokens, values] are what the tower and its merger made
    of the images before, for Qwen3-VL with the features of the deeper layers beside them; the tower does not run then,
    also when there are none. `visual_places` [image tokens] say where Qwen3-VL adds the features of the deeper layers to
    its first hidden states; by a mask it would wait for the GPU in each. `learned_places` [N] names the places that
    predict something: the last hidden state is then [1, N, D], for no other place is read behind the last attention.
    """
    _take_images(model)
    if hasattr(model.model.language_model, "_deepstack_process"):
        _take_visual_places(model.model.language_model)
    layer = model.model.language_model.layers[-1]
    layer.forward = MethodType(_last_layer, layer)


@contextmanager
def already_training(model: Any) -> Iterator[None]:
    """`model.train()` does nothing here: the Trainer calls it in every micro-batch, and there are thousands of modules."""
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train


def score_places_as_they_come(model: Any) -> None:
    """Have TRL's output head score all places that a packed batch names; they are learned, all but that of a filler.

    On a GPU it would look for the learned ones by a mask, and wait for it three times in every micro-batch; on other
    devices it scores all places. Call it on a base model that has this head. May go when the head can be told.
    """
    forward = model.forward

    @functools.wraps(forward)
    def without_mask(*args: Any, **kwargs: Any) -> Any:
        if "learned_places" not in kwargs:
            return forward(*args, **kwargs)
        compacts, trl_utils._use_triton = trl_utils._use_triton, lambda device: False
        try:
            return forward(*args, **kwargs)
        finally:
            trl_utils._use_triton = compacts

    model.forward = without_mask


def _last_layer(
    layer: Any, hidden_states: torch.Tensor, learned_places: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """A layer [1, T, D] -> [1, N, D] that spares its widest products on all but the N places that are named.

    Losses and gradients are the same; answers are a few tokens of hundreds.
    """
    if learned_places is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    reached = (hidden_states + attended).index_select(1, learned_places)
    return reached + layer.mlp(layer.post_attention_layernorm(reached))


def _take_images(model: Any) -> None:
    backbone = model.model
    computed = type(backbone).get_image_features
    width = model.config.get_text_config().hidden_size

    @functools.wraps(computed)
    def get_image_features(*args: Any, image_places: list[int] | None = None, **kwargs: Any) -> Any:
        found = computed(*args, **kwargs)
        if image_places is not None:
            found.pooler_output = tuple(found.pooler_output[place] for place in image_places)
            deeper = getattr(found, "deepstack_features", None) or []
            if deeper:
                found.deepstack_features = [tuple(layer[place] for place in image_places) for layer in deeper]
        return found

    def bring(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        features = keywords.pop("image_features", None)
        if features is None:
            return None
        last, *deeper = features.split(width, dim=-1)
        found = SimpleNamespace(pooler_output=(last,), deepstack_features=[(layer,) for layer in deeper])
        return arguments, {**keywords, "mm_encoder_outputs": {"image": found} if len(features) else {}}

    # Bound, as below: in a copy of the model it is the copy's.
    backbone.get_image_features = MethodType(get_image_features, backbone)
    backbone.register_forward_pre_hook(bring, with_kwargs=True)


def _take_visual_places(language_model: Any) -> None:
    by_mask = type(language_model)._deepstack_process

    def add(model: Any, hidden_states: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if where.dtype == torch.bool:
            return by_mask(model, hidden_states, where, features)
        return hidden_states.index_add(1, where, features.to(hidden_states.dtype)[None])

    def name_places(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        places = keywords.pop("visual_places", None)
        return None if places is None else (arguments, {**keywords, "visual_pos_masks": places})

    language_model._deepstack_process = MethodType(add, language_model)
    language_model.register_forward_pre_hook(name_places, with_kwargs=True)


def run_vision_in_every_batch(model: Any) -> None:
    """Have a batch without images run the vision tower too, on one empty patch group whose features count for nothing.

    Where weights are split over processes, or the tower is trained on several, a process whose batch holds no image would
    leave the others waiting for it. It runs between the embeddings and the language model, as in a batch with images:
    ZeRO-3 and FSDP2 expect modules in the same order everywhere. Batches that bring features run it nowhere.
    """
    backbone, visual = model.model, model.model.visual
    waiting = [False]

    def run_on_nothing(device: torch.device) -> torch.Tensor:
        side, patches = visual.spatial_merge_size, visual.patch_embed
        values = patches.in_channels * patches.temporal_patch_size * patches.patch_size**2
        pixels = torch.zeros(side * side, values, device=device)
        grid = torch.tensor([[1, side, side]], device=device)
        found = backbone.get_image_features(pixels, grid, return_dict=True)
        features = [
            *found.pooler_output,
            *(part for layer in getattr(found, "deepstack_features", []) for part in layer),
        ]
        return 0.0 * sum(feature.sum() for feature in features)

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


def call_head_after_backbone(model: Any) -> None:
    """Under FSDP2, call the output head on nothing whenever the backbone has run.

    accelerate puts the last norm, the head, and embeddings that are tied to it into one FSDP group, which gathers its
    weights when its first layer runs and is ready to do so again only when all of them have run. TRL's fused head reads
    the head's weight and never calls it. From the second forward on it would meet a weight that is split: a tied one
    fails, and of one that is not tied each process would take its own gradient for that of all, without a word. May go
    when TRL's `add_fused_lm_head` runs the head's hooks.
    """

    def call_head(backbone: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if keywords.get("use_cache"):
            return  # while generating, the model's own forward calls the head
        with torch.no_grad():
            model.get_output_embeddings()(output.last_hidden_state[:, :0])

    model.model.register_forward_hook(call_head, with_kwargs=True)
