"""Read a model's dimensions from its config.json, and count its weights and FLOPs, without a training library.

`registry.py` imports the libraries and holds all else that differs between models; a test compares what both count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_vl_sft.errors import UserError

_LINEAR = "linear_attention"


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name: their place in the model, how many there are, and their width in and out."""

    part: str
    name: str
    count: int
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Count the weights of all of them, biases left out."""
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True)
class DeltaShape:
    """Layers of linear attention by the gated delta rule.

    Attributes:
        layers: how many there are; the others have full attention.
        last: the last layer is one of them.
        keys: width over all key heads, the same as that of queries.
        heads: heads of values.
        key_width: of a head.
        value_width: of a head.
        kernel: tokens of the convolution.
        chunk: tokens inside which the rule is computed as attention is.
    """

    layers: int
    last: bool
    keys: int
    heads: int
    key_width: int
    value_width: int
    kernel: int
    chunk: int = 64

    @property
    def values(self) -> int:
        """Return the width over all heads of values."""
        return self.heads * self.value_width

    @property
    def mixed(self) -> int:
        """Return the width of what the convolution takes."""
        return 2 * self.keys + self.values

    @property
    def rule_flops(self) -> int:
        """Count the FLOPs of the rule for a token, as the family does."""
        k, v = self.key_width, self.value_width
        return self.heads * (6 * k * v + self.chunk * (3 * k + 2 * v))


@dataclass(frozen=True)
class TextShape:
    """The language model.

    `queries` and `keys` are widths over all heads, `head_norms` whether these are normed, `gated` whether the layer of
    queries also makes a gate for the output; `delta` are the layers of linear attention, None for a model without.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    head_width: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool
    biased: bool
    head_norms: bool
    gated: bool = False
    delta: DeltaShape | None = None

    @property
    def full_layers(self) -> int:
        """Count the layers of full attention."""
        return self.layers - (self.delta.layers if self.delta else 0)


@dataclass(frozen=True)
class VisionShape:
    """The vision tower and its mergers.

    Attributes:
        width: values of a patch between blocks.
        mlp: width inside a block's MLP, of `gated` kind or not.
        pixels: values of a patch that go in.
        merge: patches along a side that become one token.
        mergers: mergers, that of the last block and those of deeper features.
        full: blocks whose attention sees the whole image; the others see `window` patches.
        layer_norms: norms have a bias.
        positions: learned positions.
        patch_bias: the layer of patches has a bias.
        activation: inside a block's MLP: quick_gelu, silu or gelu.
        mlp_names: names of a block's linear layers; the last one is narrow again.
        merger_names: names of a merger's linear layers.
    """

    depth: int
    width: int
    mlp: int
    gated: bool
    pixels: int
    patch: int
    merge: int
    mergers: int
    full: int
    window: int
    layer_norms: bool
    positions: int
    patch_bias: bool
    activation: str
    mlp_names: tuple[str, ...]
    merger_names: tuple[str, str]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a model of one of the families."""

    model_type: str
    text: TextShape
    vision: VisionShape

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Return all linear layers but the output head, by their names in the model with `N` for a layer's number."""
        text, vision = self.text, self.vision
        attention, mlp = "language_model.layers.N.self_attn", "language_model.layers.N.mlp"
        full, queries = text.full_layers, text.queries * (2 if text.gated else 1)
        merged = vision.width * vision.merge**2
        up = vision.mlp_names[:-1]
        return (
            Linear("language", f"{attention}.q_proj", full, text.hidden, queries),
            Linear("language", f"{attention}.k_proj", full, text.hidden, text.keys),
            Linear("language", f"{attention}.v_proj", full, text.hidden, text.keys),
            Linear("language", f"{attention}.o_proj", full, text.queries, text.hidden),
            *self._delta_linears,
            Linear("language", f"{mlp}.gate_proj", text.layers, text.hidden, text.mlp),
            Linear("language", f"{mlp}.up_proj", text.layers, text.hidden, text.mlp),
            Linear("language", f"{mlp}.down_proj", text.layers, text.mlp, text.hidden),
            Linear("vision", "visual.blocks.N.attn.qkv", vision.depth, vision.width, 3 * vision.width),
            Linear("vision", "visual.blocks.N.attn.proj", vision.depth, vision.width, vision.width),
            *(Linear("vision", f"visual.blocks.N.mlp.{name}", vision.depth, vision.width, vision.mlp) for name in up),
            Linear("vision", f"visual.blocks.N.mlp.{vision.mlp_names[-1]}", vision.depth, vision.mlp, vision.width),
            Linear("merger", f"visual.merger.{vision.merger_names[0]}", vision.mergers, merged, merged),
            Linear("merger", f"visual.merger.{vision.merger_names[1]}", vision.mergers, merged, text.hidden),
        )

    @property
    def _delta_linears(self) -> tuple[Linear, ...]:
        text, delta, name = self.text, self.text.delta, "language_model.layers.N.linear_attn"
        if delta is None:
            return ()
        return (
            Linear("language", f"{name}.in_proj_qkv", delta.layers, text.hidden, delta.mixed),
            Linear("language", f"{name}.in_proj_z", delta.layers, text.hidden, delta.values),
            Linear("language", f"{name}.in_proj_b", delta.layers, text.hidden, delta.heads),
            Linear("language", f"{name}.in_proj_a", delta.layers, text.hidden, delta.heads),
            Linear("language", f"{name}.out_proj", delta.layers, delta.values, text.hidden),
        )

    @property
    def unfit_kernels(self) -> frozenset[str]:
        """Return the fused kernels that do not fit the model's layers; a test compares them with those of its family."""
        return frozenset({"rms_norm", "rope"}) if self.model_type == "qwen3_5" else frozenset()

    @property
    def embedding_weights(self) -> int:
        """Count the weights of the token embeddings."""
        return self.text.vocabulary * self.text.hidden

    @property
    def head_weights(self) -> int:
        """Count the weights of the output head; none where it is the embeddings."""
        return 0 if self.text.tied else self.embedding_weights

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Count the parameters of each part: vision, merger, language."""
        text, vision = self.text, self.vision
        counts = dict.fromkeys(("vision", "merger", "language"), 0)
        for linear in self.linears:
            counts[linear.part] += linear.weights
            if linear.part != "language":
                counts[linear.part] += linear.count * linear.outputs
        norm = 2 if vision.layer_norms else 1
        merged = vision.width * vision.merge**2
        counts["vision"] += vision.pixels * vision.width + vision.width * vision.patch_bias
        counts["vision"] += vision.positions * vision.width + vision.depth * 2 * norm * vision.width
        # Mergers of deeper features norm what they have merged.
        counts["merger"] += norm * (vision.width + (vision.mergers - 1) * merged)
        biases = (text.queries + 2 * text.keys) * text.biased
        counts["language"] += text.full_layers * (biases + 2 * text.head_width * text.head_norms)
        counts["language"] += (2 * text.layers + 1) * text.hidden
        if text.delta:
            # The convolution, what the decay is made of, and the norm of a head's output.
            own = text.delta.mixed * text.delta.kernel + 2 * text.delta.heads + text.delta.value_width
            counts["language"] += text.delta.layers * own
        counts["language"] += self.embedding_weights + self.head_weights
        return counts


@dataclass(frozen=True)
class Work:
    """What is computed: sums over rows, as `modeling.flops.BatchStats` counts them."""

    tokens: float
    tokens_squared: float
    target_tokens: float
    patches: float
    patches_squared: float


@dataclass(frozen=True)
class Passes:
    """Forward passes that forward and backward of a part come to; `recomputed` language layers run forward once more."""

    language: float
    vision: float
    merger: float
    recomputed: float = 0.0


@dataclass(frozen=True)
class Flops:
    """FLOPs of products with weights, and of attention."""

    weights: float
    attention: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.weights + self.attention


def training_flops(shape: ModelShape, work: Work, passes: Passes, packed: bool) -> Flops:
    """Count the FLOPs of training, 2 a multiply-add; attention over its causal half.

    A frozen layer costs its forward and the gradient of its input, a trained one also that of its weights. `packed`
    batches take the last layer's MLP for target tokens alone. `modeling.flops` counts the same with the libraries.
    """
    text, vision, delta = shape.text, shape.vision, shape.text.delta
    weights = dict.fromkeys(("vision", "merger", "language"), 0)
    for linear in shape.linears:
        weights[linear.part] += linear.weights
    late = 3 * text.hidden * text.mlp if packed and not (delta and delta.last) else 0
    language = 2 * (weights["language"] - late) * work.tokens
    language += 2 * (shape.embedding_weights + late) * work.target_tokens
    attended = 2 * text.full_layers * text.queries * work.tokens_squared
    if delta:
        language += 2 * delta.layers * delta.mixed * delta.kernel * work.tokens
        attended += delta.layers * delta.rule_flops * work.tokens
    blocks = 2 * weights["vision"] * work.patches
    seen = 4 * (vision.depth - vision.full) * vision.width * vision.window * work.patches
    seen += 4 * vision.full * vision.width * work.patches_squared
    merged = 2 * weights["merger"] / vision.merge**2 * work.patches
    return Flops(
        weights=language * (passes.language + passes.recomputed) + blocks * passes.vision + merged * passes.merger,
        attention=attended * (_products(passes.language) + passes.recomputed) + seen * _products(passes.vision),
    )


def _products(passes: float) -> float:
    """Return the passes of products without weights, given the passes of layers with weights."""
    return passes if passes <= 1 else 3


def read_shape(config: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """Read the dimensions from what a config.json holds. Raises `UserError` for a model that is not known here."""
    kind = config.get("model_type")
    if kind not in _VISION:
        raise UserError(f"{source} is a {kind} model; the plan knows {', '.join(_VISION)}")
    text: Mapping[str, Any] = {**config, **config.get("text_config", {})}
    vision: Mapping[str, Any] = config.get("vision_config", {})
    try:
        found = ModelShape(kind, _text(config, text), _VISION[kind](vision))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: has no usable {error}; give the model's own config.json") from None
    return found


def _text(config: Mapping[str, Any], text: Mapping[str, Any]) -> TextShape:
    hybrid = config["model_type"] == "qwen3_5"
    third = config["model_type"] == "qwen3_vl" or hybrid
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    # Qwen3-VL's heads are as wide as its configuration says, 128 unless it does.
    width = int(text.get("head_dim") or (128 if third else hidden // heads))
    tied = config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return TextShape(
        hidden=hidden,
        mlp=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        head_width=width,
        queries=heads * width,
        keys=int(text.get("num_key_value_heads") or heads) * width,
        vocabulary=int(text["vocab_size"]),
        tied=bool(tied),
        biased=bool(text.get("attention_bias", False)) if third else True,
        head_norms=third,
        gated=hybrid,
        delta=_delta(text) if hybrid else None,
    )


def _delta(text: Mapping[str, Any]) -> DeltaShape:
    layers, every = int(text["num_hidden_layers"]), int(text.get("full_attention_interval") or 4)
    kinds = text.get("layer_types") or ["" if (place + 1) % every == 0 else _LINEAR for place in range(layers)]
    key_width = int(text["linear_key_head_dim"])
    return DeltaShape(
        layers=sum(kind == _LINEAR for kind in kinds),
        last=kinds[-1] == _LINEAR,
        keys=int(text["linear_num_key_heads"]) * key_width,
        heads=int(text["linear_num_value_heads"]),
        key_width=key_width,
        value_width=int(text["linear_value_head_dim"]),
        kernel=int(text["linear_conv_kernel_dim"]),
    )


def _qwen2_vl(vision: Mapping[str, Any]) -> VisionShape:
    width, depth = int(vision.get("embed_dim", 1280)), int(vision.get("depth", 32))
    return VisionShape(
        depth=depth,
        width=width,
        mlp=int(width * vision.get("mlp_ratio", 4)),
        gated=False,
        mergers=1,
        full=depth,
        window=0,
        layer_norms=True,
        positions=0,
        patch_bias=False,
        activation="quick_gelu",
        mlp_names=("fc1", "fc2"),
        merger_names=("mlp.0", "mlp.2"),
        **_patches(vision, 14),
    )


def _qwen2_5_vl(vision: Mapping[str, Any]) -> VisionShape:
    depth, patch = int(vision.get("depth", 32)), int(vision.get("patch_size", 14))
    full = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
    return VisionShape(
        depth=depth,
        width=int(vision.get("hidden_size", 3584)),
        mlp=int(vision.get("intermediate_size", 3420)),
        gated=True,
        mergers=1,
        full=sum(index < depth for index in full),
        window=(int(vision.get("window_size", 112)) // patch) ** 2,
        layer_norms=False,
        positions=0,
        patch_bias=False,
        activation="silu",
        mlp_names=("gate_proj", "up_proj", "down_proj"),
        merger_names=("mlp.0", "mlp.2"),
        **_patches(vision, 14),
    )


def _qwen3_vl(vision: Mapping[str, Any]) -> VisionShape:
    depth = int(vision.get("depth", 27))
    deeper = vision.get("deepstack_visual_indexes", (8, 16, 24))
    return VisionShape(
        depth=depth,
        width=int(vision.get("hidden_size", 1152)),
        mlp=int(vision.get("intermediate_size", 4304)),
        gated=False,
        mergers=1 + len(deeper or ()),
        full=depth,
        window=0,
        layer_norms=True,
        positions=int(vision.get("num_position_embeddings", 2304)),
        patch_bias=True,
        activation="gelu",
        mlp_names=("linear_fc1", "linear_fc2"),
        merger_names=("linear_fc1", "linear_fc2"),
        **_patches(vision, 16),
    )


def _qwen3_5(vision: Mapping[str, Any]) -> VisionShape:
    """Read the tower, which is Qwen3-VL's without the features of deeper layers."""
    return _qwen3_vl({**vision, "deepstack_visual_indexes": ()})


def _patches(vision: Mapping[str, Any], patch: int) -> dict[str, int]:
    patch = int(vision.get("patch_size", patch))
    channels = int(vision.get("in_channels", 3))
    return {
        "pixels": channels * int(vision.get("temporal_patch_size", 2)) * patch * patch,
        "patch": patch,
        "merge": int(vision.get("spatial_merge_size", 2)),
    }


_VISION: dict[str, Callable[[Mapping[str, Any]], VisionShape]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
}


def _released(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, keys: int, words: int, tied: bool, **vision: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "vision_config": vision,
    }


_TOWER_2_5 = {"hidden_size": 1280}
_LARGE_3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": (8, 16, 24)}
_SMALL_3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": (5, 11, 17)}
# Dimensions of released models, from their config.json on the Hub; used where that file is not on this machine.
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": _released("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": _released("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2-VL-72B-Instruct": _released("qwen2_vl", 8192, 29568, 80, 64, 8, 152064, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _released("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, **_TOWER_2_5),
    "Qwen/Qwen2.5-VL-7B-Instruct": _released("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, **_TOWER_2_5),
    "Qwen/Qwen2.5-VL-32B-Instruct": _released(
        "qwen2_5_vl", 5120, 27648, 64, 40, 8, 152064, False, intermediate_size=3456, **_TOWER_2_5
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": _released(
        "qwen2_5_vl", 8192, 29568, 80, 64, 8, 152064, False, intermediate_size=3456, **_TOWER_2_5
    ),
    "Qwen/Qwen3-VL-2B-Instruct": _released("qwen3_vl", 2048, 6144, 28, 16, 8, 151936, True, **_SMALL_3),
    "Qwen/Qwen3-VL-4B-Instruct": _released("qwen3_vl", 2560, 9728, 36, 32, 8, 151936, True, **_SMALL_3),
    "Qwen/Qwen3-VL-8B-Instruct": _released("qwen3_vl", 4096, 12288, 36, 32, 8, 151936, False, **_LARGE_3),
    "Qwen/Qwen3-VL-32B-Instruct": _released("qwen3_vl", 5120, 25600, 64, 64, 8, 151936, False, **_LARGE_3),
}

# Of a head's rotated values, those that turn with time, height and width, and how fast.
_ROTATED: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "qwen2_5_vl": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "qwen3_vl": {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}


def released_config(name: str) -> dict[str, Any]:
    """Return what transformers' configuration of a model of `RELEASED` takes, such as for one with random weights."""
    text = dict(RELEASED[name])
    kind, vision, tied = text.pop("model_type"), dict(text.pop("vision_config")), text.pop("tie_word_embeddings")
    vision["hidden_size" if kind == "qwen2_vl" else "out_hidden_size"] = text["hidden_size"]
    vision = {name: [*value] if isinstance(value, tuple) else value for name, value in vision.items()}
    text["rope_parameters"] = {"rope_type": "default", **_ROTATED[kind]}
    return {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
