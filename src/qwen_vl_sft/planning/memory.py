"""Work out the memory that training takes on each GPU, split by what takes it.

Counted are the tensors that PyTorch's allocator holds at the moment that needs most; `layer_memory.py` counts those of a
layer. `scripts/check_plan.py` compares with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_vl_sft.planning.layer_memory import (
    language_bytes,
    last_behind_bytes,
    last_layer_bytes,
    vision_block_bytes,
    widest_gradients,
    widest_layer_bytes,
)
from qwen_vl_sft.planning.training_setup import HALF, NF4_BYTES, NF4_NESTED_BYTES, SINGLE, Training

# Of a GPU's memory, left free for what the allocator cannot use and for the communication of processes.
MARGIN = 0.08
# The head is computed in tiles of so many tokens and words (TRL's chunked_logprob).
_TILE = (4096, 8192)


@dataclass(frozen=True)
class BatchSizes:
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


def memory_of(training: Training, batch: BatchSizes, checkpointed: int) -> MemorySplit:
    """Return the memory of a step whose largest micro-batch is `batch`, with so many of `training.blocks` checkpointed.

    The vision tower's layers are checkpointed first, those of the language model after them.
    """
    text = training.shape.text
    depth = training.blocks - text.layers
    towers, layers = min(checkpointed, depth), max(0, checkpointed - depth)
    static = _static(training)
    kept = language_bytes(training) * batch.tokens
    last = last_layer_bytes(training) * batch.tokens + last_behind_bytes(training) * batch.target_tokens
    stream = text.hidden * training.stream * batch.tokens
    repeated = 2 * text.keys * training.computed * batch.tokens * batch.repeated_keys
    whole = kept + repeated
    # The last layer keeps less, as its MLP sees target tokens alone.
    saved = (
        layers * stream + max(text.layers - 1 - layers, 0) * whole + (0 if layers == text.layers else last + repeated)
    )
    # The widest moment of a layer's backward pass: its MLP's gradient beside a few of the stream's width.
    moment = (widest_gradients(training) * training.computed + 3 * text.hidden * training.stream) * batch.tokens
    activations = saved + (widest_layer_bytes(training) * batch.tokens + repeated if layers else 0.0) + moment
    seen, seeing = _vision(training, batch, towers)
    tile = min(batch.target_tokens, _TILE[0]) * min(text.vocabulary, _TILE[1]) * HALF
    logits = tile + batch.target_tokens * text.hidden * (SINGLE + 2 * training.stream)
    if not training.full:
        if seeing > activations + logits:
            # The tower computes when the language model keeps nothing, not yet or no longer.
            return replace(static, vision=seen + seeing)
        return replace(static, activations=activations, vision=seen, logits=logits)
    head = training.shape.embedding_weights * SINGLE  # its gradient, before it is added
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
        buffers += count * SINGLE  # gradients lie in buckets beside those of the weights
    if zero and training.processes > 1 and training.strategy != "zero3":
        buffers += 0.0 if not training.full else 2e8 * HALF
    return MemorySplit(base, adapters, gradients, states, 0.0, 0.0, 0.0, caches, buffers)


def _trained_bytes(training: Training, count: int) -> tuple[float, float, float]:
    """Return the bytes of what trains itself, of its gradients, and of optimizer states with ZeRO's copies, on a GPU."""
    split, strategy = training.processes, training.strategy
    weight = SINGLE if training.mixed or not training.full else training.stored
    if strategy in ("single", "ddp"):
        return count * weight, count * weight, count * training.optimizer * (weight / SINGLE)
    if strategy == "fsdp2":
        return count * weight, count * weight / split, count * training.optimizer / split
    # ZeRO computes with copies in half precision and keeps those in float32 split.
    own = HALF if training.mixed else weight
    whole = split if strategy in ("zero2", "zero3") else 1
    return count * own, count * SINGLE / whole, count * (SINGLE + training.optimizer) / split


def _cached_bytes(training: Training) -> float:
    """Return the bytes of copies of weights: unpacked ones for a product, half-precision ones of autocast."""
    text, experts = training.shape.text, training.shape.text.experts
    largest = max(linear.inputs * linear.outputs for linear in training.shape.linears)
    # The experts of a layer are unpacked together, for the product that widens.
    stack = 2 * experts.count * experts.mlp * text.hidden if experts else 0
    unpacked = max(largest, stack) * training.computed if training.bits in (4, 8) else 0.0
    copies = 0.0
    if training.mixed and training.strategy in ("single", "ddp"):
        copies = training.trained_weights * HALF
    return unpacked + copies


def _buffer_bytes(training: Training, base: float) -> float:
    """Return the bytes of weights that are gathered from other GPUs: two layers, and what belongs to no layer."""
    if training.strategy not in ("zero3", "fsdp2") or training.processes == 1:
        return 0.0
    shape = training.shape
    layers = sum(entry.weights for entry in shape.linears if entry.part == "language") + shape.expert_weights
    layer = layers / shape.text.layers
    dtype = {4: NF4_NESTED_BYTES, 8: 1.0}.get(training.bits, float(HALF if training.mixed else training.stored))
    ends = (shape.embedding_weights + shape.head_weights) * (HALF if training.mixed else training.stored)
    # FSDP2 keeps both ends gathered; of DeepSpeed's live weights about so much was measured.
    gathered = 2 * layer * dtype + ends * (1.0 if training.strategy == "fsdp2" else 0.75)
    return gathered + (layer * SINGLE if training.full else 0.0)


def _vision(training: Training, batch: BatchSizes, checkpointed: int) -> tuple[float, float]:
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
    layer = batch.patches * vision_block_bytes(training)
    # Unlike that of the language model, what passes from block to block is in half precision under autocast too.
    stream = batch.patches * width * half
    blocks = checkpointed * stream + (vision.depth - checkpointed) * layer
    return pixels + features + blocks, layer + moment if checkpointed else moment


def _vision_end(training: Training, batch: BatchSizes) -> float:
    """Return the bytes of the tower at the end of the backward pass, in its first block, and the gradients of its stream."""
    vision = training.shape.vision
    if training.cached_features or "vision" not in training.trained_parts:
        return 0.0
    gradients = batch.patches * (vision.mlp * training.computed + 3 * vision.width * training.stream)
    return batch.patches * (vision.pixels * training.computed + vision_block_bytes(training)) + gradients


def keep_as_many(training: Training, batch: BatchSizes, room: float) -> int:
    """Return how many layers `gradient_checkpointing: auto` would checkpoint: as few as `room` bytes allow, or all."""
    low, high = 0, training.blocks
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if memory_of(training, batch, middle).total <= room else (middle + 1, high)
    return low
