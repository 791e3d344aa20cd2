"""Have a transformers Qwen-VL model train on batches of the packed collator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_vl_sft.compat.registry import Patch, embedded_model
from qwen_vl_sft.families.registry import family_of


def take_packed_batches(model: Any, spares_last_layer: bool = True) -> None:
    """Have a model take batches of the packed collator; it takes all others as before.

    `image_index`, a list, gives for each image shown its number in `pixel_values`: the vision tower runs once on each
    different image, and its gradients add up. `image_features` [image tokens, values] are what the tower and its mergers
    made of the images before, layer beside layer; the tower does not run then, also when there are none.
    `logit_positions` [N] are the positions that predict a target: the last hidden state is then [1, N, D], for no other
    one is read behind the last attention, nor computed with `spares_last_layer`. What else a batch brings is taken by the
    family (`prepare_packing`).
    """
    _take_images(model)
    family_of(model.config).prepare_packing(model)
    layer = model.model.language_model.layers[-1]
    layer.forward = MethodType(_last_layer if spares_last_layer else _whole_last_layer, layer)


def count_no_placeholders_in_training(model: Any) -> None:
    """Have a model not count the image tokens of a batch in training: it would wait for the GPU in every micro-batch.

    The packed collator has counted them. transformers also writes the count into an error message that nobody sees.
    """
    counted = type(model.model).get_placeholder_mask

    @functools.wraps(counted)
    def get_placeholder_mask(
        backbone: Any, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not backbone.training or input_ids is None:
            return counted(backbone, input_ids, inputs_embeds, *args, **kwargs)
        return _placeholder_mask(backbone, input_ids)

    model.model.get_placeholder_mask = MethodType(get_placeholder_mask, model.model)


@contextmanager
def reading_prompts(backbone: Any) -> Iterator[None]:
    """Have a model read packed prompts meanwhile: their image tokens are counted, and it takes `logit_positions`.

    These do what they do in `take_packed_batches`, whether or not that was called.
    """
    layer = backbone.language_model.layers[-1]
    put_in = {
        backbone: ("get_placeholder_mask", MethodType(_placeholder_mask, backbone)),
        layer: ("forward", MethodType(_last_layer, layer)),
    }
    before = {module: vars(module).get(name) for module, (name, _) in put_in.items()}
    try:
        for module, (name, method) in put_in.items():
            setattr(module, name, method)
        yield
    finally:
        for module, (name, _) in put_in.items():
            if before[module] is None:
                delattr(module, name)
            else:
                setattr(module, name, before[module])


def _placeholder_mask(backbone: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Return the masks of image and video tokens in `input_ids` [1, T]: [1, T, 1] each."""
    tokens = (backbone.config.image_token_id, backbone.config.video_token_id)
    return tuple((input_ids == token).unsqueeze(-1) for token in tokens)


@contextmanager
def already_training(model: Any) -> Iterator[None]:
    """Make `model.train()` do nothing meanwhile: the Trainer calls it in every micro-batch, for thousands of modules."""
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train


def _last_layer(
    layer: Any, hidden_states: torch.Tensor, logit_positions: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """Compute a layer [1, T, D] -> [1, N, D] that spares its widest products on all but the N positions that are named.

    Losses and gradients are the same; answers are a few tokens of hundreds. A layer of another kind than attention spares
    nothing.
    """
    if logit_positions is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    if not hasattr(layer, "self_attn"):
        return _whole_last_layer(layer, hidden_states, logit_positions, **kwargs)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    reached = (hidden_states + attended).index_select(1, logit_positions)
    return reached + layer.mlp(layer.post_attention_layernorm(reached))


def _whole_last_layer(
    layer: Any, hidden_states: torch.Tensor, logit_positions: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """Compute a layer [1, T, D] -> [1, N, D] on all positions, and give the N that are named."""
    found: torch.Tensor = type(layer).forward(layer, hidden_states, **kwargs)
    return found if logit_positions is None else found.index_select(1, logit_positions)


def _take_images(model: Any) -> None:
    backbone, family = model.model, family_of(model.config)
    computed = type(backbone).get_image_features
    width = model.config.get_text_config().hidden_size

    @functools.wraps(computed)
    def get_image_features(*args: Any, image_index: list[int] | None = None, **kwargs: Any) -> Any:
        found = computed(*args, **kwargs)
        if image_index is not None:
            layers = family.feature_layers(found)
            return family.feature_output([tuple(layer[number] for number in image_index) for layer in layers])
        return found

    def bring(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        features = keywords.pop("image_features", None)
        if features is None:
            return None
        found = family.feature_output([(layer,) for layer in features.split(width, dim=-1)])
        return arguments, {**keywords, "mm_encoder_outputs": {"image": found} if len(features) else {}}

    # Bound: in a copy of the model it is the copy's.
    backbone.get_image_features = MethodType(get_image_features, backbone)
    backbone.register_forward_pre_hook(bring, with_kwargs=True)


def _counting_reads_back() -> bool:
    """Return whether `get_placeholder_mask` of the embedded model turns a tensor into a Python number."""
    backbone = type(embedded_model().model)
    tokens = SimpleNamespace(config=SimpleNamespace(image_token_id=1, video_token_id=2))
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            read.append(operation.overloadpacket.__name__ == "_local_scalar_dense")
            return operation(*args, **(kwargs or {}))

    with Reads():
        backbone.get_placeholder_mask(tokens, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, 3), torch.ones(2, 3))
    return any(read)


PATCHES = (
    Patch(
        name="take_packed_batches",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Models run the vision tower once per image shown, and the last layer on tokens that predict nothing.",
        applied_by="compat.packed_batches.take_packed_batches",
        relies_on={
            "model.model.get_image_features": ("pixel_values", "image_grid_thw"),
            "model.model.language_model._deepstack_process": ("hidden_states", "visual_pos_masks", "visual_embeds"),
            "model.model.language_model.layers.-1.forward": ("hidden_states",),
            "model.model.forward": ("mm_encoder_outputs",),
        },
        reads={
            "model.model.language_model.layers.-1.forward": (
                "self.self_attn(",
                "self.input_layernorm(",
                "self.post_attention_layernorm(",
                "self.mlp(",
            )
        },
    ),
    Patch(
        name="count_no_placeholders_in_training",
        package="transformers",
        broken="<=5.23",
        without="Models wait for the GPU in every micro-batch to count image tokens that the collator has counted.",
        applied_by="compat.packed_batches.count_no_placeholders_in_training",
        links=("https://github.com/huggingface/transformers/pull/44907",),
        still_needed=_counting_reads_back,
        relies_on={"model.model.get_placeholder_mask": ("input_ids", "inputs_embeds")},
    ),
)
