"""Estimate the seconds of a step from FLOPs, memory traffic and what the host needs to start the work.

The constants were fitted to what was measured on H200s (`benchmarks/plan.json`, and half of `plan_settled_h200.json` and
`plan_alike_h200.json`); another card is taken to reach the same shares of its own rates. `tools/check_plan.py` tells how
far the estimates are off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_vl_sft.families.shape import Passes, Work, training_flops
from qwen_vl_sft.planning.cards import Card
from qwen_vl_sft.planning.layer_memory import language_bytes
from qwen_vl_sft.planning.training_setup import NF4_NESTED_BYTES, Training

# Share of the card's dense half-precision peak that large matrix products reach, and share of its bandwidth.
PRODUCTS, BANDWIDTH = 0.88, 0.7
# What products in FP8 reach, as a share of the half-precision peak.
FP8_PRODUCTS = 1.7
# The same where a width is no multiple of 8, as the 3,420 inside the MLPs of Qwen2.5-VL's smaller towers: measured alone
# on an H200, 248 TFLOP/s into that width and 215 out of it, where 3,424 reaches 719 and 761.
UNALIGNED = 0.24
# The same in products grouped by expert, with a share of their tokens and rows in new places before and after; fitted to
# one run of 8 layers of Qwen3-VL-30B-A3B (benchmarks/experts_qwen3_vl_moe_h200.json), LoRA on attention.
GROUPED = 0.21
# The same share of attention: PyTorch's kernels, and FlashAttention built for the card.
ATTENTION, FLASH_ATTENTION = 0.17, 0.2
# How often what a layer keeps is read or written: forward and backward, and once more to compute it again.
TRAFFIC, TRAFFIC_AGAIN = 7.4, 3.5
# How often what goes into a layer with LoRA, and what comes out of it, are read or written for the adapter alone.
ADAPTERS = 1.9
# How often queries, keys, values and gates of linear attention are read or written, by its kernels and between them;
# fitted to runs of Qwen3.5-9B (benchmarks/qwen3_5_9b_h200.json). Without the kernels it takes longer.
DELTA_TRAFFIC = 96
# Seconds of the host for a layer's forward and backward pass, whose kernels it starts one by one.
HOST_SECONDS = {
    "single": 0.0027,
    "ddp": 0.0027,
    "zero1": 0.0047,
    "zero2": 0.0047,
    "fsdp2": 0.0062,
    "zero3": 0.0152,
}
# A layer that is computed again, and one whose own weights train, take so much more.
HOST_AGAIN, HOST_FULL = 0.25, 0.26
# Of the rate of a link, what collectives reach; and what of their time no computation hides.
LINK, EXPOSED = 0.7, 0.3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, its FLOPs that count as useful, and those that are computed with layers run once more."""

    seconds: float
    useful_flops: float
    computed_flops: float


def passes_of(training: Training, checkpointed: int = 0) -> Passes:
    """Return how many forward passes each part's forward and backward come to, as `FlopCounter.of` does."""
    backward, parts = (3 if training.full else 2), training.trained_parts
    layers = max(0, checkpointed - (training.blocks - training.shape.text.layers))
    return Passes(
        language=backward,
        vision=0 if training.cached_features else backward if "vision" in parts else 1,
        merger=0 if training.cached_features else 1 if parts <= {"language"} else backward,
        recomputed=layers / training.shape.text.layers,
    )


def step_time(training: Training, card: Card, work: Work, micro_batches: float, checkpointed: int) -> StepTime:
    """Estimate a step of `micro_batches` on each GPU, which are `work` together."""
    useful = training_flops(training.shape, work, passes_of(training), training.packing)
    computed = training_flops(training.shape, work, passes_of(training, checkpointed), training.packing)
    attention = FLASH_ATTENTION if training.flash_attention else ATTENTION
    device = (computed.weights / PRODUCTS + computed.attention / attention) / card.flops
    device += _unaligned_flops(training, work) * (1 / UNALIGNED - 1 / PRODUCTS) / card.flops
    device += _expert_flops(training, work, checkpointed) * (1 / GROUPED - 1 / PRODUCTS) / card.flops
    if training.fp8 or training.fp8_gradients:
        # The frozen layers' products of the forward pass, of the gradients, and of layers computed again; those of experts
        # are taken to be as fast as in half precision.
        passes = 2 + passes_of(training, checkpointed).recomputed if training.fp8 else 1
        in_fp8 = 2 * training.language_weights * work.tokens * passes
        device -= in_fp8 * (1 / PRODUCTS - 1 / FP8_PRODUCTS) / card.flops
    device += _traffic(training, work, micro_batches, checkpointed) / (card.bandwidth * BANDWIDTH)
    again = HOST_AGAIN * checkpointed / training.blocks + HOST_FULL * training.full
    blocks = training.shape.text.layers + (0 if training.cached_features else training.shape.vision.depth)
    host = micro_batches * blocks * HOST_SECONDS[training.strategy] * (1 + again)
    # Host and device work side by side, but each waits for the other now and then.
    seconds = math.hypot(device, host) + EXPOSED * _communication(training, card, micro_batches)
    return StepTime(seconds, useful.total, computed.total)


def _unaligned_flops(training: Training, work: Work) -> float:
    """Return the FLOPs of the tower's layers whose width is no multiple of 8 values, 16 bytes: few kernels take these."""
    layers = (linear for linear in training.shape.linears if linear.part == "vision")
    weights = sum(linear.weights for linear in layers if linear.inputs % 8 or linear.outputs % 8)
    return 2 * weights * work.patches * passes_of(training).vision


def _expert_flops(training: Training, work: Work, checkpointed: int) -> float:
    """Return the FLOPs of the experts that tokens go through."""
    text, experts, passes = training.shape.text, training.shape.text.experts, passes_of(training, checkpointed)
    if experts is None:
        return 0.0
    spared = training.packing and experts.last and not (text.delta and text.delta.last)
    tokens = experts.layers * work.tokens - (work.tokens - work.target_tokens if spared else 0)
    return 2 * experts.chosen * text.expert_weights * tokens * (passes.language + passes.recomputed)


def _traffic(training: Training, work: Work, micro_batches: float, checkpointed: int) -> float:
    """Return the bytes that go through the device's memory beside those of matrix products."""
    shape, depth = training.shape, training.blocks - training.shape.text.layers
    again = TRAFFIC_AGAIN * max(0, checkpointed - depth) / shape.text.layers
    language = language_bytes(training) * shape.text.layers * work.tokens * (TRAFFIC + again)
    adapted = sum(
        entry.count * (entry.inputs + entry.outputs) for entry in training.adapted or () if entry.part == "language"
    )
    language += adapted * training.computed * work.tokens * ADAPTERS
    if delta := shape.text.delta:
        language += DELTA_TRAFFIC * delta.layers * (delta.mixed + delta.values) * training.computed * work.tokens
    vision = shape.vision
    patch = training.computed * (12 * vision.width + 3 * vision.mlp) * vision.depth
    tower = 0.0
    if not training.cached_features:
        tower = patch * work.patches * (1 if "vision" not in training.trained_parts else TRAFFIC / 2)
    weights = sum(linear.weights for linear in shape.linears) + shape.expert_weights
    unpacked = 0.0
    if training.fp8:
        # Transposed for the backward pass: read, written.
        unpacked = 2 * training.quantized_weights * micro_batches
    elif training.fp8_gradients:
        # Quantized and transposed for the backward pass: read and written twice.
        unpacked = (training.stored + 3) * training.language_weights * micro_batches
    elif training.bits in (4, 8):
        # Unpacked once for the forward pass and once for the backward pass: read, written, read.
        unpacked = 2 * weights * (NF4_NESTED_BYTES + 2 * training.computed) * micro_batches
    optimizer = (
        training.trained_weights * 30 / (training.processes if training.strategy not in ("single", "ddp") else 1)
    )
    return language + tower + unpacked + optimizer


def _communication(training: Training, card: Card, micro_batches: float) -> float:
    """Return the seconds of collectives of a step, over the slowest link that a GPU has to another."""
    split = training.processes
    if split == 1:
        return 0.0
    share, rate = (split - 1) / split, card.link * LINK
    gradients = training.trained_weights * 4 * 2 * share
    if training.strategy in ("single", "ddp", "zero1", "zero2"):
        return gradients / rate
    linear = training.quantized_weights
    each = {4: NF4_NESTED_BYTES, 8: 1.0}.get(training.bits, 2.0)
    times = 3 if training.strategy == "zero3" else 2
    return (times * linear * each * share * micro_batches + gradients * micro_batches / 2) / rate
