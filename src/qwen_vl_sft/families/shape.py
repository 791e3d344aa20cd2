"""The dimensions of a model, and its weights and FLOPs by them, without a training library.

`registry.py` imports the libraries and holds all else that differs between models; a test compares what both count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

# Fused kernels that do not fit a model's layers.
_UNFIT = {
    "qwen3_vl_moe": ("swiglu",),
}


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
class ExpertsShape:
    """Layers whose MLP is a mixture of experts.

    Attributes:
        layers: how many there are; the others have an MLP.
        last: the last layer is one of them.
        count: experts of a layer.
        chosen: experts that a token goes through.
        mlp: width inside an expert.
        shared: width inside the one more expert that every token goes through; 0 for none.
    """

    layers: int
    last: bool
    count: int
    chosen: int
    mlp: int
    shared: int


@dataclass(frozen=True)
class TextShape:
    """The language model.

    `queries` and `keys` are widths over all heads, `head_norms` whether these are normed, `gated` whether the layer of
    queries also makes a gate for the output; `delta` are the layers of linear attention and `experts` those of a mixture,
    None for a model without.
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
    experts: ExpertsShape | None = None

    @property
    def full_layers(self) -> int:
        """Count the layers of full attention."""
        return self.layers - (self.delta.layers if self.delta else 0)

    @property
    def dense_layers(self) -> int:
        """Count the layers with an MLP that every token goes through."""
        return self.layers - (self.experts.layers if self.experts else 0)

    @property
    def expert_weights(self) -> int:
        """Count the weights of an expert."""
        return 3 * self.hidden * self.experts.mlp if self.experts else 0

    @property
    def behind_attention(self) -> int:
        """Count the weights behind the last layer's attention that a token is multiplied with."""
        experts = self.experts
        if experts is None or not experts.last:
            return 3 * self.hidden * self.mlp
        shared = 3 * self.hidden * experts.shared + (self.hidden if experts.shared else 0)
        return experts.chosen * self.expert_weights + self.hidden * experts.count + shared


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
            *_mlp_linears(mlp, text.dense_layers, text.hidden, text.mlp),
            *self._shared_linears,
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
    def _shared_linears(self) -> tuple[Linear, ...]:
        text, experts, name = self.text, self.text.experts, "language_model.layers.N.mlp.shared_expert"
        if experts is None or not experts.shared:
            return ()
        gate = Linear("language", f"{name}_gate", experts.layers, text.hidden, 1)
        return (*_mlp_linears(name, experts.layers, text.hidden, experts.shared), gate)

    @property
    def expert_weights(self) -> int:
        """Count the weights of all experts of all layers, which lie in no linear layer."""
        experts = self.text.experts
        return experts.layers * experts.count * self.text.expert_weights if experts else 0

    @property
    def router_weights(self) -> int:
        """Count the weights of all routers."""
        experts = self.text.experts
        return experts.layers * experts.count * self.text.hidden if experts else 0

    @property
    def unfit_kernels(self) -> frozenset[str]:
        """Return the fused kernels that do not fit the model's layers; a test compares them with those of its family."""
        experts = () if self.text.experts else ("experts",)
        linear = () if self.text.delta else ("linear_attention",)
        return frozenset({*_UNFIT.get(self.model_type, ()), *experts, *linear})

    @property
    def shared_openings(self) -> bool:
        """Return what its family's `shared_openings` is; a test compares them."""
        return self.text.delta is None

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
        counts["language"] += self.expert_weights + self.router_weights
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
    if text.experts:
        # A token goes through its experts alone, and through the router.
        chosen = text.experts.layers * text.experts.chosen * text.expert_weights
        weights["language"] += chosen + shape.router_weights
    late = text.behind_attention if packed and not (delta and delta.last) else 0
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


def _mlp_linears(name: str, count: int, hidden: int, mlp: int) -> tuple[Linear, ...]:
    if not count:
        return ()
    return (
        Linear("language", f"{name}.gate_proj", count, hidden, mlp),
        Linear("language", f"{name}.up_proj", count, hidden, mlp),
        Linear("language", f"{name}.down_proj", count, mlp, hidden),
    )


def _products(passes: float) -> float:
    """Return the passes of products without weights, given the passes of layers with weights."""
    return passes if passes <= 1 else 3
