"""Count the bytes that layers keep for their backward pass, for each token and, in the vision tower, for each patch.

They follow from the operations of transformers' layers with the kernels of `modeling.kernels`: each operation keeps the
inputs that its gradient reads. Tests compare most of them with what autograd keeps.
"""

from __future__ import annotations

from qwen_vl_sft.planning.training_setup import SINGLE, Training

# What linear attention keeps: bytes of a value, of a key repeated for each head of values (a row's first chunk keeps 4
# less), of a head, of a token.
_DELTA_VALUES, _DELTA_KEYS, _DELTA_HEAD, _DELTA_TOKEN = 26, 38, 930, 16
# Bytes of each of a token's experts: its number, its places before and after sorting, its weight in both precisions.
_ROUTED = 38
# The same of a head, in the kernels: decay and beta with what they come from.
_DELTA_KERNEL = 24


def language_bytes(training: Training) -> float:
    """Return the bytes a token that a layer of the language model keeps for its backward pass, on average."""
    text = training.shape.text
    share = text.full_layers / text.layers
    linear = delta_bytes(training) if text.delta else 0.0
    dense = text.dense_layers / text.layers
    behind = (dense * mlp_bytes(training) if dense else 0.0) + (1 - dense) * experts_bytes(training)
    return share * attention_bytes(training) + (1 - share) * linear + behind


def widest_layer_bytes(training: Training) -> float:
    """Return the bytes a token of the layer that keeps most, once it is computed again."""
    linear = delta_bytes(training) if training.shape.text.delta else 0.0
    dense = mlp_bytes(training) if training.shape.text.dense_layers else 0.0
    return max(attention_bytes(training), linear) + max(dense, experts_bytes(training))


def widest_gradients(training: Training) -> float:
    """Return the values a token of the widest gradients inside what stands behind a layer's attention."""
    text, experts = training.shape.text, training.shape.text.experts
    dense = text.mlp if text.dense_layers else 0
    # A token is there once for each of its experts: as it goes in, as it comes out, and in its old place.
    return max(dense, 3 * experts.chosen * text.hidden) if experts else dense


def attention_bytes(training: Training) -> float:
    """Return the bytes a token that full attention keeps."""
    text, wide, half = training.shape.text, training.stream, training.computed
    kept = float(_norm_bytes(training, text.hidden))
    kept += (2 * text.queries + 2 * text.keys) * half + SINGLE * text.heads
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
        kept += 2 * SINGLE * delta.heads * delta.key_width * delta.value_width / delta.chunk
    if training.full:
        kept += text.hidden * half * (4 if wide > half else 1)
        kept += delta.values * (SINGLE + half) + 4 * delta.heads
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return kept + _adapter_bytes(training, names, text.hidden) + _adapter_bytes(training, ("out_proj",), delta.values)


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
    kept = float(_norm_bytes(training, text.hidden)) + SINGLE * (experts.count + 1) + _ROUTED * chosen
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


def last_behind_bytes(training: Training) -> float:
    """Return the bytes a token of what stands behind the last layer's attention."""
    experts = training.shape.text.experts
    return experts_bytes(training) if experts and experts.last else mlp_bytes(training)


def last_layer_bytes(training: Training) -> float:
    """Return the bytes a token that the last layer keeps: without an MLP where rows are packed."""
    delta = training.shape.text.delta
    if delta and delta.last:
        return delta_bytes(training) + last_behind_bytes(training)
    return attention_bytes(training) + (0.0 if training.packing else last_behind_bytes(training))


def _norm_bytes(training: Training, width: int, dtype: int | None = None, rows: int = 1) -> int:
    """Return what a norm of a token's `rows` keeps: its input with the kernel, else copies in float32; their lengths."""
    dtype, lengths = training.stream if dtype is None else dtype, rows * SINGLE
    if "rms_norm" in training.kernels:
        return width * dtype + lengths
    # For the gradient of its weight what it has normed too, in float32 where it multiplies by weight + 1.
    normed = SINGLE if training.shape.text.delta else dtype
    return width * (SINGLE + (normed if training.full else 0)) + lengths


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


def vision_block_bytes(training: Training) -> float:
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
        values = 2 * SINGLE + (11 if wide > half else 10) * half
    return values * vision.width + widest * vision.mlp * half
