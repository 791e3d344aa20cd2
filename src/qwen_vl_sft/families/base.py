"""The record that describes a model family, and what all Qwen-VL families share.

Everything that differs between families is a field of `ModelFamily`; the defaults are those of Qwen2-VL, from which
the others were made. The rest of the package asks the family of a model's configuration (`registry.family_of`) and
compares no model type itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import MODEL_MAPPING
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.experts import Experts
from qwen_vl_sft.families.flops import ForwardFlops

PARTS = ("vision", "merger", "language")
# True, or the reason why a family cannot do it, as a user reads it after "... does not work with NAME: ".
Capability = Literal[True] | str
# Features of a batch of images: for each layer that the language model takes, a tensor [merged tokens, D] an image.
FeatureLayers = list[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class BoxForm:
    """How a model writes boxes, points and the names of objects.

    The defaults are those of Qwen2-VL: thousandths of the image's sides between special tokens (paper, section 2.2).

    Attributes:
        coordinates: "norm1000" for thousandths of the sides, "resized" for pixels of the resized image.
        box: text of a box, of x1, y1, x2 and y2.
        point: text of a point, of x and y.
        reference: text of an object's name.
    """

    coordinates: Literal["norm1000", "resized"] = "norm1000"
    box: str = "<|box_start|>({},{}),({},{})<|box_end|>"
    point: str = "<|box_start|>({},{})<|box_end|>"
    reference: str = "<|object_ref_start|>{}<|object_ref_end|>"


def plain_boxes(coordinates: Literal["norm1000", "resized"]) -> BoxForm:
    """Return lists of numbers without special tokens, as Qwen's cookbooks put them into JSON since Qwen2.5-VL."""
    return BoxForm(coordinates, box="[{}, {}, {}, {}]", point="[{}, {}]", reference="{}")


@dataclass(frozen=True)
class ChatFormat:
    """The tokens that give a conversation its structure, and the options of its chat template.

    Attributes:
        image: stands for one merged patch; the template writes one an image.
        video: the same for videos.
        vision_start: opens an image.
        vision_end: closes an image; the tokenizer merges no text into it.
        end_of_turn: ends every message.
        start_of_thought: opens the thought before an answer, for templates that know thoughts.
        end_of_thought: closes it.
        structural: tokens that would forge a turn or an image inside a text.
        template_options: arguments of `apply_chat_template` for training and generation alike.
        boxes: how boxes, points and names of objects are written.
    """

    image: str = "<|image_pad|>"
    video: str = "<|video_pad|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    end_of_turn: str = "<|im_end|>"
    start_of_thought: str = "<think>"
    end_of_thought: str = "</think>"
    structural: tuple[str, ...] = (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    template_options: Mapping[str, Any] = field(default_factory=dict)
    boxes: BoxForm = BoxForm()

    @property
    def visual(self) -> tuple[str, ...]:
        """Return the tokens of images and videos, which are never a target."""
        return (self.vision_start, self.vision_end, self.image, self.video)


@dataclass(frozen=True)
class FusedLayers:
    """The layers whose forward a fused kernel replaces.

    Attributes:
        kind: how the names of their classes end.
        parts: the parts of the model in which they are replaced.
        path: how their names in the model end.
        activations: class names of `act_fn`, of which one must be the layer's; empty for any.
    """

    kind: str
    parts: tuple[str, ...]
    path: str = ""
    activations: tuple[str, ...] = ()

    def holds(self, name: str, part: str, module: nn.Module) -> bool:
        """Return whether `module`, called `name`, in this `part` of a model, is one of these layers."""
        if part not in self.parts or not type(module).__name__.endswith(self.kind) or not name.endswith(self.path):
            return False
        return not self.activations or type(getattr(module, "act_fn", None)).__name__ in self.activations


@dataclass(frozen=True)
class RopeFunctions:
    """The functions in the model's module that rotate queries and keys.

    Attributes:
        language: name of the language model's.
        vision: name of the vision tower's.
        whole_heads: whether the language model rotates whole heads, and not their first values alone.
    """

    language: str = "apply_rotary_pos_emb"
    vision: str = "apply_rotary_pos_emb_vision"
    whole_heads: bool = True


@dataclass(frozen=True)
class PackedLayout:
    """Where the pieces of a packed sequence of T tokens are.

    A piece is a run of tokens of one row. It sees itself and the piece before it in its row, its `parent`: the shared
    prefix of a branch. A state that is carried from token to token must begin anew in each piece, from its parent's.

    Attributes:
        lengths: tokens of each piece, in the order of the sequence.
        parents: for each piece the number of its parent, None for none.
        visual_positions: [image tokens] int64, positions of image tokens in the sequence.
    """

    lengths: Sequence[int]
    parents: Sequence[int | None]
    visual_positions: torch.Tensor


def resized_image(width: int, height: int, image_processor: Any) -> tuple[int, int]:
    """Return width and height to which the image processor of all families resizes an image."""
    limits = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    return resized_within(width, height, image_processor.patch_size * image_processor.merge_size, *limits)


def resized_within(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return width and height in multiples of `factor`, of at least `least` and at most `most` pixels."""
    new_height, new_width = smart_resize(height, width, factor, least, most)
    return new_width, new_height


@dataclass(frozen=True)
class StateStep:
    """Which states the layers that carry one from token to token go on from, and which they leave, in a forward pass.

    Attributes:
        lengths: tokens of each piece of packed prompts, in the order of the sequence.
        begins: for each piece the slot that it goes on from, None for one that begins a prompt.
        ends: for each piece the slot that it leaves its state in. A piece stands behind the one that it goes on from.
        slots: [B] int64, where one token of each of B rows is computed instead: the slots that these go on from and leave.
    """

    lengths: Sequence[int] = ()
    begins: Sequence[int | None] = ()
    ends: Sequence[int] = ()
    slots: torch.Tensor | None = None


class RowStates(Protocol):
    """States of the rows that are being answered, in layers that carry one from token to token."""

    def applied(self, step: StateStep) -> AbstractContextManager[None]:
        """Have these layers do what a step says, in forward passes of one sequence."""


def reason_against(key: str, name: str, reason: str) -> str:
    """Return why a recipe key does not work with the family of this name."""
    return f"{key} does not work with {name}: {reason}"


def image_inputs(config: Any, grids: torch.Tensor) -> dict[str, Any]:
    """Return what every vision tower would work out from `grids` [I, 3], waiting for the GPU image by image.

    Returns `image_position_ids` [P, 2], `image_cu_seqlens` [I + 1] int32 and `image_max_seqlen`.
    """
    boundaries = get_vision_cu_seqlens(grids)
    return {
        "image_position_ids": get_vision_position_ids(grids, config.vision_config.spatial_merge_size),
        "image_cu_seqlens": boundaries,
        "image_max_seqlen": int(boundaries.diff().max()),
    }


def interpolated_image_inputs(config: Any, grids: torch.Tensor) -> dict[str, Any]:
    """Return `image_inputs`, and those of a tower that interpolates its learned positions, Qwen3-VL's and later ones.

    Adds `image_interp_indices` [P, 4] and `image_interp_weights` [P, 4] float32.
    """
    vision = config.vision_config
    # The mode is that of its vision model, which no configuration names.
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids,
        int(vision.num_position_embeddings**0.5),
        "bilinear",
        align_corners=True,
        spatial_merge_size=vision.spatial_merge_size,
    )
    return {**image_inputs(config, grids), "image_interp_indices": indices, "image_interp_weights": weights}


def rope_index_of_class(config: Any) -> Callable[..., Any]:
    """Return the model class's own `get_rope_index`, bound to an object that holds the configuration and no weights."""
    backbone: Any = MODEL_MAPPING[type(config)]
    stub = types.SimpleNamespace(config=config)
    stub.get_vision_position_ids = types.MethodType(backbone.get_vision_position_ids, stub)
    return types.MethodType(backbone.get_rope_index, stub)


def last_layer_features(output: Any) -> FeatureLayers:
    """Return what a tower gave in `get_image_features`: the merged features of its last layer."""
    return [output.pooler_output]


def last_layer_output(layers: FeatureLayers) -> Any:
    """Return `layers` as `get_image_features` would: the opposite of `last_layer_features`."""
    return types.SimpleNamespace(pooler_output=tuple(layers[0]))


# Classes of one activation: transformers' and PyTorch's.
_SILU = ("SiLU", "SiLUActivation")
FUSED_LAYERS: Mapping[str, FusedLayers] = {
    "rms_norm": FusedLayers("RMSNorm", ("language",)),
    "swiglu": FusedLayers("MLP", ("language",), activations=_SILU),
    "rope": FusedLayers("Attention", PARTS),
    "quick_gelu": FusedLayers("QuickGELUActivation", ("vision", "merger")),
    "patch_embed": FusedLayers("Conv3d", ("vision",), path="patch_embed.proj"),
    "experts": FusedLayers("Experts", ("language",), activations=_SILU),
    "linear_attention": FusedLayers("GatedDeltaNet", ("language",)),
}
# Of a family without experts, and of one without linear attention, beside what else does not fit it.
NO_EXPERTS: Mapping[str, str] = {"experts": "it has none"}
NO_LINEAR_ATTENTION: Mapping[str, str] = {"linear_attention": "it has none"}


@dataclass(frozen=True)
class ModelFamily:
    """What the package must know of one family of models.

    Paths are those of modules inside the backbone (`model.model`), wherever in an adapted model that stands.

    Attributes:
        model_type: `model_type` of the configuration.
        name: how people write it.
        flops: counts one forward of a configuration; the flag says that batches are packed.
        tower: path of the vision tower.
        mergers: paths of what turns patches into tokens of the language model.
        language: path of the language model.
        output_head: name of the output head in the whole model.
        chat: tokens and chat template.
        rope_index: gives for a configuration `get_rope_index`, which computes M-RoPE positions.
        patch_inputs: gives for a configuration and `grids` [I, 3] what the tower would work out from them.
        packed_entries: gives for a configuration what a packed batch brings beside what every family takes.
        prepare_packing: changes a loaded model so that it takes `packed_entries`, layers with a state among them.
        row_states: makes for a model, a number of slots and a type what keeps the states of rows that are answered, for
            layers that carry one from token to token; None without such layers.
        state_bytes: gives for a configuration and a type the memory of such a slot.
        feature_layers: gives the features in an output of `get_image_features`, layer by layer.
        feature_output: makes such an output of features.
        count_feature_layers: gives for a configuration the number of these layers.
        fused_layers: for each fused kernel the layers that it can replace.
        unfit_kernels: for each fused kernel that would compute something else, the reason.
        norm_offset: what the norms of the language model add to their weight.
        rope_functions: the functions that the kernel for rotary embeddings replaces.
        keep_16bit: modules that are not quantized, by name or by the end of it.
        experts: where the mixtures of experts are; None for a family without.
        unloaded_weights: how the keys of weights begin that lie in a checkpoint's files and that transformers does not
            load, such as those for predicting several tokens at once. A merge and a full fine-tuning keep them as they are.
        adapt_template: changes the text of a processor's chat template so that it takes `chat.template_options`.
        slow: what runs in PyTorch's own operations without the kernel `linear_attention`, in at most 66 characters; the
            plan tells it.
        thinking: whether `enable_thinking` chooses between answers with a thought and answers without one.
        packing: whether rows can be packed.
        shared_prefixes: whether packed rows can share their prefix.
        shared_openings: whether prefixes that are shared can in turn share the text that they begin with.
        feature_cache: whether features of a frozen tower can be kept on disk.
    """

    model_type: str
    name: str
    flops: Callable[[Any, bool], ForwardFlops]
    tower: str = "visual"
    mergers: tuple[str, ...] = ("visual.merger",)
    language: str = "language_model"
    output_head: str = "lm_head"
    chat: ChatFormat = field(default_factory=ChatFormat)
    rope_index: Callable[[Any], Callable[..., Any]] = rope_index_of_class
    patch_inputs: Callable[[Any, torch.Tensor], dict[str, Any]] = image_inputs
    packed_entries: Callable[[Any, PackedLayout], dict[str, Any]] = lambda config, layout: {}
    prepare_packing: Callable[[Any], None] = lambda model: None
    row_states: Callable[[Any, int, torch.dtype], RowStates | None] = lambda model, slots, dtype: None
    state_bytes: Callable[[Any, torch.dtype], int] = lambda config, dtype: 0
    feature_layers: Callable[[Any], FeatureLayers] = last_layer_features
    feature_output: Callable[[FeatureLayers], Any] = last_layer_output
    count_feature_layers: Callable[[Any], int] = lambda config: 1
    fused_layers: Mapping[str, FusedLayers] = field(default_factory=lambda: FUSED_LAYERS)
    unfit_kernels: Mapping[str, str] = field(default_factory=lambda: {**NO_EXPERTS, **NO_LINEAR_ATTENTION})
    norm_offset: float = 0.0
    rope_functions: RopeFunctions = field(default_factory=RopeFunctions)
    # bitsandbytes would quantize the output head too when it is not tied.
    keep_16bit: tuple[str, ...] = ("lm_head",)
    experts: Experts | None = None
    unloaded_weights: tuple[str, ...] = ()
    adapt_template: Callable[[str], str] = lambda template: template
    slow: str | None = None
    thinking: Capability = "its chat template decides by itself whether an answer begins with a thought"
    packing: Capability = True
    shared_prefixes: Capability = True
    shared_openings: bool = True
    feature_cache: Capability = True

    def chat_with(self, enable_thinking: bool) -> ChatFormat:
        """Return the chat format of a recipe, which says whether answers begin with a thought.

        Raises `UserError` where the family leaves no choice and a thought is asked for.
        """
        if self.thinking is not True:
            if enable_thinking:
                raise UserError(f"{reason_against('enable_thinking', self.name, self.thinking)}; leave it out")
            return self.chat
        return replace(self.chat, template_options={**self.chat.template_options, "enable_thinking": enable_thinking})

    def stays_16bit(self, name: str) -> bool:
        """Return whether 4-bit and 8-bit leave a module alone, by its whole name."""
        return any(f".{name}".endswith(f".{kept}") for kept in self.keep_16bit)

    def part_of(self, name: str) -> str:
        """Return which of `PARTS` a parameter, module or stored tensor belongs to, by its name under any prefix."""
        if any(_holds(name, merger) for merger in self.mergers):
            return "merger"
        return "vision" if _holds(name, self.tower) else "language"

    def tower_of(self, model: nn.Module) -> tuple[str, Any]:
        """Return the name and the module of the vision tower of a model, with or without an adapter."""
        return next((name, module) for name, module in model.named_modules() if f".{name}".endswith(f".{self.tower}"))


def _holds(name: str, path: str) -> bool:
    return f".{path}." in f".{name}."
