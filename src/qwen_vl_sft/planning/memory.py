"""Work out the memory that training takes on each GPU, split by what takes it.

Counted are the tensors that PyTorch's allocator holds at the moment that needs most. What a layer keeps for its backward
pass follows from the operations of transformers' layers with the kernels of `modeling.kernels`: each operation keeps the
inputs that its gradient reads. `tools/check_plan.py` compares with what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from qwen_vl_sft.families.shape import Linear, ModelShape

# Of a GPU's memory, left free for what the allocator cannot use and for the communication of processes.
MARGIN = 0.08
# A block of 4-bit weights has 64 weights and a constant of 32 bits; double quantization makes that 8 bits, and 32 bits
# for each 256 of these (QLoRA, section 3).
NF4_BYTES, NF4_NESTED_BYTES = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of optimizer states a trained weight, by `optim`; Adam's two moments in float32 for any other.
OPTIMIZER_BYTES = {
    "sgd": 0.0,
    "adafactor": 0.02,  # a row and a column of each matrix
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
}
ADAM_BYTES = 8.0
_HALF, _SINGLE = 2, 4
# What linear attention keeps: bytes of a value, of a key repeated for each head of values (a row's first chunk keeps 4
# less), of a head, of a token.
_DELTA_VALUES, _DELTA_KEYS, _DELTA_HEAD, _DELTA_TOKEN = 26, 38, 930, 16
# Bytes of each of a token's experts: its number, its places before and after sorting, its weight in both precisions.
_ROUTED = 38
# The same of a head, in the kernels: decay and beta with what they come from.
_DELTA_KERNEL = 24
# The head is computed in tiles of so many tokens and words (TRL's chunked_logprob).
_TILE = (4096, 8192)


@dataclass(frozen=True)
class Training:
    """What of a run decides on its memory and time.

    Attributes:
        shape: the model.
        bits: of the base's linear weights: 4, 8, 16 or 32.
        nested: 4-bit constants are quantized too.
        fp8: 8-bit weights are FP8, those of the language model alone, and so are its products.
        stored: bytes of every other weight of the base.
        mixed: layers compute in half precision, whatever their weights are stored in.
        adapted: the layers with LoRA; None when the model's own weights train.
        adapts_experts: every expert has LoRA too.
        train_router: what chooses the experts trains, in full.
        rank: of LoRA.
        dropout: on the adapter's input.
        in_full: weights trained beside the adapter.
        freeze_vision: the tower does not train in full fine-tuning.
        kernels: fused kernels.
        packing: rows are packed.
        cached_features: the vision tower does not run.
        flash_attention: attention is FlashAttention 3 or 4.
        optimizer: bytes of its states a trained weight.
        strategy: single, ddp, zero1, zero2, zero3 or fsdp2.
        processes: GPUs.
        accumulates: a step has several micro-batches, so that the gradients of the first are there during the last.
    """

    shape: ModelShape
    bits: int = 16
    nested: bool = True
    fp8: bool = False
    stored: int = _HALF
    mixed: bool = True
    adapted: tuple[Linear, ...] | None = ()
    adapts_experts: bool = False
    train_router: bool = False
    rank: int = 16
    dropout: bool = False
    in_full: int = 0
    freeze_vision: bool = False
    kernels: frozenset[str] = frozenset()
    packing: bool = True
    cached_features: bool = False
    flash_attention: bool = False
    optimizer: float = ADAM_BYTES
    strategy: str = "single"
    processes: int = 1
    accumulates: bool = True

    @cached_property
    def trained_parts(self) -> frozenset[str]:
        """Return the parts in which something trains."""
        if self.adapted is None:
            return frozenset({"merger", "language"} | (set() if self.freeze_vision else {"vision"}))
        return frozenset(linear.part for linear in self.adapted)

    @cached_property
    def adapter_weights(self) -> int:
        """Count the weights of LoRA."""
        layers = sum(linear.count * self.rank * (linear.inputs + linear.outputs) for linear in self.adapted or ())
        return layers + self.expert_adapter_weights

    @property
    def expert_adapter_weights(self) -> int:
        """Count the weights of LoRA on experts: a pair for the product that widens, one for that which narrows."""
        text, experts = self.shape.text, self.shape.text.experts
        if experts is None or not self.adapts_experts:
            return 0
        return experts.layers * experts.count * self.rank * (2 * text.hidden + 3 * experts.mlp)

    @property
    def quantized_weights(self) -> int:
        """Return the number of weights of linear layers and experts that are held in `bits`."""
        layers = sum(entry.weights for entry in self.shape.linears if not self.fp8 or entry.part == "language")
        return layers + self.shape.expert_weights

    @property
    def trained_weights(self) -> int:
        """Count all weights that train."""
        routers = self.shape.router_weights if self.train_router else 0
        if self.adapted is not None:
            return self.adapter_weights + self.in_full + routers
        counts = self.shape.parameters
        trained = sum(count for part, count in counts.items() if part in self.trained_parts)
        return trained - self.shape.router_weights + routers

    @property
    def blocks(self) -> int:
        """Count the layers that can be checkpointed: those that a gradient passes."""
        return self.shape.text.layers + (self.shape.vision.depth if "vision" in self.trained_parts else 0)

    @property
    def full(self) -> bool:
        """Return whether the model's own weights train."""
        return self.adapted is None

    @property
    def keeps_gradients(self) -> bool:
        """Return whether gradients are there when the last micro-batch of a step begins.

        DeepSpeed's always are; FSDP2 with all weights has not been measured.
        """
        return self.accumulates or self.strategy not in ("single", "ddp")

    @property
    def computed(self) -> int:
        """Return the bytes of a value that layers compute."""
        return _HALF if self.mixed else self.stored

    @property
    def stream(self) -> int:
        """Return the bytes of a value that passes from layer to layer.

        Full fine-tuning under autocast passes float32; ZeRO and FSDP2 compute on half-precision copies.
        """
        wide = self.full and self.mixed and self.strategy in ("single", "ddp")
        return _SINGLE if wide else self.computed


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of a micro-batch on one GPU: tokens, those that predict a target, vision patches, keys and values gathered
    for shared prefixes as a share of the tokens.
    """

    tokens: float
    target_tokens: float
    patches: float
    repeated_keys: float = 0.0


@dataclass(frozen=True)
class MemorySplit:
    """Bytes on each GPU, by what holds them at the moment that needs most.

    Attributes:
        weights: the base as it is stored, or the weights that train.
        adapters: LoRA.
        gradients: of what trains.
        optimizer: states, and the copies that ZeRO keeps of what trains.
        activations: kept for the backward pass, and what one layer computes meanwhile.
        vision: the same of the vision tower, and pixels.
        logits: the output head.
        caches: half-precision copies of weights, and 4-bit weights unpacked for a product.
        buffers: weights and gradients in communication.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    vision: float
    logits: float
    caches: float
    buffers: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return sum(vars(self).values())

    @property
    def static(self) -> float:
        """Return what does not grow with the micro-batch."""
        return self.total - self.activations - self.vision - self.logits


def targets(shape: ModelShape, names: Iterable[str] | None, parts: Iterable[str]) -> tuple[Linear, ...]:
    """Return the layers that `lora_target_modules` names, by how their names end; all of `parts` for None."""
    if names is None or list(names) == ["all-linear"]:
        wanted = set(parts)
        return tuple(linear for linear in shape.linears if linear.part in wanted)
    endings = tuple(names)
    return tuple(linear for linear in shape.linears if any(f".{linear.name}".endswith(f".{end}") for end in endings))


def memory_of(training: Training, batch: MicroBatch, checkpointed: int) -> MemorySplit:
    """Return the memory of a step whose largest micro-batch is `batch`, with so many of `training.blocks` checkpointed.

    The vision tower's layers are checkpointed first, those of the language model after them.
    """
    text = training.shape.text
    depth = training.blocks - text.layers
    towers, layers = min(checkpointed, depth), max(0, checkpointed - depth)
    static = _static(training)
    kept = language_bytes(training) * batch.tokens
    last = _last_layer_bytes(training) * batch.tokens + _last_behind_bytes(training) * batch.target_tokens
    stream = text.hidden * training.stream * batch.tokens
    repeated = 2 * text.keys * training.computed * batch.tokens * batch.repeated_keys
    whole = kept + repeated
    # The last layer keeps less, as its MLP sees target tokens alone.
    saved = (
        layers * stream + max(text.layers - 1 - layers, 0) * whole + (0 if layers == text.layers else last + repeated)
    )
    # The widest moment of a layer's backward pass: its MLP's gradient beside a few of the stream's width.
    moment = (_moment_width(training) * training.computed + 3 * text.hidden * training.stream) * batch.tokens
    activations = saved + (_widest_layer_bytes(training) * batch.tokens + repeated if layers else 0.0) + moment
    seen, seeing = _vision(training, batch, towers)
    tile = min(batch.target_tokens, _TILE[0]) * min(text.vocabulary, _TILE[1]) * _HALF
    logits = tile + batch.target_tokens * text.hidden * (_SINGLE + 2 * training.stream)
    if not training.full:
        if seeing > activations + logits:
            # The tower computes when the language model keeps nothing, not yet or no longer.
            return replace(static, vision=seen + seeing)
        return replace(static, activations=activations, vision=seen, logits=logits)
    head = training.shape.embedding_weights * _SINGLE  # its gradient, before it is added
    # Of gradients, what is there before the backward pass, once it has passed the language model, and at its end.
    before = static.gradients if training.keeps_gradients else 0.0
    passed = static.gradients if training.keeps_gradients else static.gradients * _passed_share(training)
    return max(
        # The copies of autocast live until the forward pass ends, or where they are kept for the backward pass.
        replace(static, gradients=before, activations=saved + moment, vision=seen, logits=logits),
        replace(
            static,
            gradients=before,
            activations=activations,
            vision=seen,
            logits=logits + head,
            caches=static.caches * (1 - checkpointed / training.blocks),
        ),
        replace(static, gradients=passed, vision=seen + seeing, caches=static.caches if not towers else 0.0),
        replace(static, vision=_vision_end(training, batch), caches=0.0),
        key=lambda split: split.total,
    )


def _passed_share(training: Training) -> float:
    """Return the share of the gradients that are there once the backward pass has reached the vision tower."""
    counts = training.shape.parameters
    return 1 - (counts["vision"] if "vision" in training.trained_parts else 0) / max(training.trained_weights, 1)


def _vision_end(training: Training, batch: MicroBatch) -> float:
    """Return the bytes of the tower at the end of the backward pass, in its first block, and the gradients of its stream."""
    vision = training.shape.vision
    if training.cached_features or "vision" not in training.trained_parts:
        return 0.0
    gradients = batch.patches * (vision.mlp * training.computed + 3 * vision.width * training.stream)
    return batch.patches * (vision.pixels * training.computed + _vision_block_bytes(training)) + gradients


def language_bytes(training: Training) -> float:
    """Return the bytes a token that a layer of the language model keeps for its backward pass, on average."""
    text = training.shape.text
    share = text.full_layers / text.layers
    linear = delta_bytes(training) if text.delta else 0.0
    dense = text.dense_layers / text.layers
    behind = (dense * mlp_bytes(training) if dense else 0.0) + (1 - dense) * experts_bytes(training)
    return share * attention_bytes(training) + (1 - share) * linear + behind


def _widest_layer_bytes(training: Training) -> float:
    """Return the bytes a token of the layer that keeps most, once it is computed again."""
    linear = delta_bytes(training) if training.shape.text.delta else 0.0
    dense = mlp_bytes(training) if training.shape.text.dense_layers else 0.0
    return max(attention_bytes(training), linear) + max(dense, experts_bytes(training))


def _moment_width(training: Training) -> float:
    """Return the values a token of the widest gradients inside what stands behind a layer's attention."""
    text, experts = training.shape.text, training.shape.text.experts
    dense = text.mlp if text.dense_layers else 0
    # A token is there once for each of its experts: as it goes in, as it comes out, and in its old place.
    return max(dense, 3 * experts.chosen * text.hidden) if experts else dense


def delta_bytes(training: Training) -> float:
    """Return the bytes a token that linear attention keeps over packed rows.

    In PyTorch's operations counted by autograd itself, in bfloat16 by autocast; a test compares. The rule then computes
    in float32: most is for each head what it has of a chunk (the decay of each pair, two products and the triangular
    system), and the states at the chunks' beginnings. The kernels keep what they take, and a square of each chunk.
    """
    text, delta = training.shape.text, training.shape.text.delta
    assert delta is not None
    wide, half = training.stream, training.computed
    kept = float(_norm_bytes(training, text.hidden)) + _DELTA_TOKEN
    if "linear_attention" in training.kernels:
        kept += 2 * half * (delta.mixed + delta.values) + delta.heads * (half * delta.chunk + _DELTA_KERNEL)
    else:
        kept += 2 * half * delta.mixed + _DELTA_VALUES * delta.values
        kept += delta.heads * (_DELTA_KEYS * delta.key_width + _DELTA_HEAD * delta.chunk / 64)
        kept += 2 * _SINGLE * delta.heads * delta.key_width * delta.value_width / delta.chunk
    if training.full:
        kept += text.hidden * half * (4 if wide > half else 1)
        kept += delta.values * (_SINGLE + half) + 4 * delta.heads
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return kept + _adapter_bytes(training, names, text.hidden) + _adapter_bytes(training, ("out_proj",), delta.values)


def attention_bytes(training: Training) -> float:
    """Return the bytes a token that full attention keeps."""
    text, wide, half = training.shape.text, training.stream, training.computed
    kept = float(_norm_bytes(training, text.hidden))
    kept += (2 * text.queries + 2 * text.keys) * half + _SINGLE * text.heads
    if text.gated:
        # The gate, and what it is multiplied with.
        kept += (3 if training.full else 2) * text.queries * half
    if text.head_norms:
        kept += _norm_bytes(training, text.queries + text.keys, half, rows=text.heads + text.keys // text.head_width)
    if training.full:
        # Autocast makes the three products' inputs anew, from float32.
        kept += text.hidden * half * (3 if wide > half else 1)
    return (
        kept
        + _adapter_bytes(training, ("q_proj", "k_proj", "v_proj"), text.hidden, kept_anyway=training.fp8)
        + _adapter_bytes(training, ("o_proj",), text.queries, kept_anyway=not text.gated)
    )


def mlp_bytes(training: Training) -> float:
    """Return the bytes a token that a layer's norm and MLP keep."""
    text = training.shape.text
    return _norm_bytes(training, text.hidden) + _gated_bytes(training, text.mlp)


def _gated_bytes(training: Training, mlp: int) -> float:
    """Return the bytes a token that a gated MLP of some width keeps."""
    text, wide, half = training.shape.text, training.stream, training.computed
    kept = float((2 if "swiglu" in training.kernels else 3) * mlp * half)
    # FP8 kernels keep no input that a norm or the activation has made: its gradient needs what they were made of.
    down = _adapter_bytes(training, ("down_proj",), mlp, kept_anyway=training.fp8)
    if training.full:
        kept += text.hidden * half * (2 if wide > half else 1)
        down = mlp * half
    inner = _adapter_bytes(
        training, ("gate_proj", "up_proj", "shared_expert_gate"), text.hidden, kept_anyway=training.fp8
    )
    return kept + inner + down


def experts_bytes(training: Training) -> float:
    """Return the bytes a token that a layer's norm, router and experts keep; 0 for a model without experts.

    A token is there once for each of its experts: between its expert's products, and where transformers computes them,
    as it comes out, for the gradient of what it is weighed with.
    """
    text, experts, half = training.shape.text, training.shape.text.experts, training.computed
    if experts is None:
        return 0.0
    # Autocast leaves their products in the precision of what goes in.
    chosen, value = experts.chosen, training.stream
    # The router's probabilities, and the sum of those chosen; their numbers, places before and after sorting, weights.
    kept = float(_norm_bytes(training, text.hidden)) + _SINGLE * (experts.count + 1) + _ROUTED * chosen
    if "experts" in training.kernels:
        kept += chosen * 2 * experts.mlp * value
    elif training.bits == 4 or training.fp8 or training.adapts_experts:
        kept += chosen * 4 * experts.mlp * value
    else:
        kept += chosen * (3 * experts.mlp + text.hidden) * value
    if training.full or training.adapts_experts:
        kept += chosen * (text.hidden + experts.mlp) * value
    if training.adapts_experts:
        kept += chosen * 2 * training.rank * half
    if training.train_router:
        kept += text.hidden * half
    if experts.shared:
        # What its gate multiplies, and the gate. Autocast makes the gate's input anew too.
        kept += _gated_bytes(training, experts.shared) + text.hidden * half + half
        kept += text.hidden * half if training.full and value > half else 0
    return kept


def _last_behind_bytes(training: Training) -> float:
    """Return the bytes a token of what stands behind the last layer's attention."""
    experts = training.shape.text.experts
    return experts_bytes(training) if experts and experts.last else mlp_bytes(training)


def _last_layer_bytes(training: Training) -> float:
    """Return the bytes a token that the last layer keeps: without an MLP where rows are packed."""
    delta = training.shape.text.delta
    if delta and delta.last:
        return delta_bytes(training) + _last_behind_bytes(training)
    return attention_bytes(training) + (0.0 if training.packing else _last_behind_bytes(training))


def _norm_bytes(training: Training, width: int, dtype: int | None = None, rows: int = 1) -> int:
    """Return what a norm of a token's `rows` keeps: its input with the kernel, else copies in float32; their lengths."""
    dtype, lengths = training.stream if dtype is None else dtype, rows * _SINGLE
    if "rms_norm" in training.kernels:
        return width * dtype + lengths
    # For the gradient of its weight what it has normed too, in float32 where it multiplies by weight + 1.
    normed = _SINGLE if training.shape.text.delta else dtype
    return width * (_SINGLE + (normed if training.full else 0)) + lengths


def _adapter_bytes(training: Training, names: tuple[str, ...], width: int, kept_anyway: bool = False) -> float:
    """Return the bytes a token that the adapters on layers of one input keep: that input, and what has passed A.

    With the `lora` kernel they keep one input together. PEFT casts it for each, and dropout makes another one for each.
    """
    adapted = [linear for linear in training.adapted or () if linear.part == "language"]
    count = sum(linear.name.endswith(names) for linear in adapted)
    if not count:
        return 0.0
    inner = count * training.rank * training.computed
    if training.dropout or "lora" not in training.kernels:
        return inner + count * width * (training.computed + training.dropout)
    return inner + (0 if kept_anyway else width * training.computed)


def _vision(training: Training, batch: MicroBatch, checkpointed: int) -> tuple[float, float]:
    """Return the bytes of the tower that stay until the backward pass, and those of a moment of its forward pass."""
    vision, half = training.shape.vision, training.computed
    if training.cached_features or not batch.patches:
        return 0.0, 0.0
    pixels = batch.patches * vision.pixels * half
    width, mlp = vision.width, vision.mlp * (2 if vision.gated else 1)
    # Input, normed input, query, key, value and their rotated copies in float32, output; then the MLP's.
    moment = batch.patches * half * max(12 * width, 3 * width + 2.5 * mlp)
    features = batch.patches / vision.merge**2 * training.shape.text.hidden * half * vision.mergers
    if "vision" not in training.trained_parts:
        merger = 3 * batch.patches * width * half if "merger" in training.trained_parts else 0.0
        return pixels + features + merger, moment
    layer = batch.patches * _vision_block_bytes(training)
    # Unlike that of the language model, what passes from block to block is in half precision under autocast too.
    stream = batch.patches * width * half
    blocks = checkpointed * stream + (vision.depth - checkpointed) * layer
    return pixels + features + blocks, layer + moment if checkpointed else moment


def _vision_block_bytes(training: Training) -> float:
    """Return the bytes a patch that a block of a tower that trains keeps for its backward pass."""
    vision, wide, half = training.shape.vision, training.stream, training.computed
    # Of the widest values: before and after the activation, and what it needs between.
    fused = vision.activation == "gelu" or vision.activation in training.kernels
    widest = 4 if vision.gated else 2 if fused else 3
    # Inputs of both norms, which autocast makes anew in float32, and what the linear layers take; query, key and value as
    # they came, since the value is a view of them; rotated query and key; the output.
    values = 2 * wide + 8 * half
    if not vision.layer_norms:
        # The norms compute in float32, and keep what they have normed for the gradient of their weights.
        values = 2 * _SINGLE + (11 if wide > half else 10) * half
    return values * vision.width + widest * vision.mlp * half


def _static(training: Training) -> MemorySplit:
    """Return what does not grow with the micro-batch."""
    shape, sharded = training.shape, training.strategy in ("zero3", "fsdp2")
    linear = training.quantized_weights
    every = sum(shape.parameters.values())
    each = {4: NF4_NESTED_BYTES if training.nested else NF4_BYTES, 8: 1.0}.get(training.bits, training.stored)
    base = linear * each + (every - linear) * training.stored
    count, split = training.trained_weights, training.processes
    zero = training.strategy.startswith("zero")
    own, gradients, states = _trained_bytes(training, count)
    adapters = 0.0 if training.full else own
    if training.full:
        base = own + (every - count) * training.stored
    if sharded:
        base, adapters = base / split, adapters / split
    caches = _cached_bytes(training)
    buffers = _buffer_bytes(training, base * split if sharded else base)
    if training.strategy == "ddp" and training.processes > 1:
        buffers += count * _SINGLE  # gradients lie in buckets beside those of the weights
    if zero and training.processes > 1 and training.strategy != "zero3":
        buffers += 0.0 if not training.full else 2e8 * _HALF
    return MemorySplit(base, adapters, gradients, states, 0.0, 0.0, 0.0, caches, buffers)


def _trained_bytes(training: Training, count: int) -> tuple[float, float, float]:
    """Return the bytes of what trains itself, of its gradients, and of optimizer states with ZeRO's copies, on a GPU."""
    split, strategy = training.processes, training.strategy
    weight = _SINGLE if training.mixed or not training.full else training.stored
    if strategy in ("single", "ddp"):
        return count * weight, count * weight, count * training.optimizer * (weight / _SINGLE)
    if strategy == "fsdp2":
        return count * weight, count * weight / split, count * training.optimizer / split
    # ZeRO computes with copies in half precision and keeps those in float32 split.
    own = _HALF if training.mixed else weight
    whole = split if strategy in ("zero2", "zero3") else 1
    return count * own, count * _SINGLE / whole, count * (_SINGLE + training.optimizer) / split


def _cached_bytes(training: Training) -> float:
    """Return the bytes of copies of weights: unpacked ones for a product, half-precision ones of autocast."""
    text, experts = training.shape.text, training.shape.text.experts
    largest = max(linear.inputs * linear.outputs for linear in training.shape.linears)
    # The experts of a layer are unpacked together, for the product that widens.
    stack = 2 * experts.count * experts.mlp * text.hidden if experts else 0
    unpacked = max(largest, stack) * training.computed if training.bits in (4, 8) else 0.0
    copies = 0.0
    if training.mixed and training.strategy in ("single", "ddp"):
        copies = training.trained_weights * _HALF
    return unpacked + copies


def _buffer_bytes(training: Training, base: float) -> float:
    """Return the bytes of weights that are gathered from other GPUs: two layers, and what belongs to no layer."""
    if training.strategy not in ("zero3", "fsdp2") or training.processes == 1:
        return 0.0
    shape = training.shape
    layers = sum(entry.weights for entry in shape.linears if entry.part == "language") + shape.expert_weights
    layer = layers / shape.text.layers
    dtype = {4: NF4_NESTED_BYTES, 8: 1.0}.get(training.bits, float(_HALF if training.mixed else training.stored))
    ends = (shape.embedding_weights + shape.head_weights) * (_HALF if training.mixed else training.stored)
    # FSDP2 keeps both ends gathered; of DeepSpeed's live weights about so much was measured.
    gathered = 2 * layer * dtype + ends * (1.0 if training.strategy == "fsdp2" else 0.75)
    return gathered + (layer * _SINGLE if training.full else 0.0)


def keep_as_many(training: Training, batch: MicroBatch, room: float) -> int:
    """Return how many layers `gradient_checkpointing: auto` would checkpoint: as few as `room` bytes allow, or all."""
    low, high = 0, training.blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if memory_of(training, batch, middle).total <= room else (middle + 1, high)
    return low
