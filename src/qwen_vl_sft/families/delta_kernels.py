"""Gated delta-net layers of packed sequences with the kernels of flash-linear-attention, compared with float32 first.

The rule (`chunk_gated_delta_rule`) and the convolution (`causal_conv1d`) take the bounds of pieces and first states, and
give gradients for both (https://github.com/fla-org/flash-linear-attention, 0.6.0). They are called so that a change of
rows is no new call to tune: Triton tunes by heads, by sizes and by which of the states there are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qwen_vl_sft.families import delta_gradient
from qwen_vl_sft.families.delta_norms import gated_norm, normalised
from qwen_vl_sft.families.gated_delta_net import TORCH, Operations, RoundRule, in_order_of_rounds


def convolve(layer: Any, projected: torch.Tensor, pieces: dict[str, Any], before: torch.Tensor | None) -> torch.Tensor:
    """Convolve each piece behind the inputs before it: [1, T, C] -> [1, T, C], in the order of the rounds."""
    from fla.modules.causal_conv1d import causal_conv1d

    if layer.activation not in ("silu", "swish"):
        return TORCH.convolve(layer, projected, pieces, before)
    # [S, C, kernel]; of its first input no output is made.
    first = None
    if before is not None:
        first = F.pad(before.to(projected.dtype), (1, 0))
    elif "before" in pieces:
        places = pieces["before"]
        inputs = projected[0].index_select(0, places.flatten().clamp(min=0)).unflatten(0, places.shape)
        first = inputs.masked_fill((places < 0).unsqueeze(-1), 0).transpose(1, 2).contiguous()
    weight = layer.conv1d.weight.squeeze(1)
    mixed, _ = causal_conv1d(
        projected,
        weight,
        layer.conv1d.bias,
        initial_state=first,
        activation="silu",
        cu_seqlens=pieces["bounds"],
        chunk_indices=pieces["chunks"],
    )
    return in_order_of_rounds(mixed, pieces)


def rule(layer: Any) -> RoundRule:
    """Return the gated delta rule of all pieces of a round in one call."""
    complete()
    return delta_rule


@functools.cache
def complete() -> None:
    """Have flash-linear-attention compute the gradients that it refuses, also where transformers calls it (padded rows)."""
    delta_gradient.register()


def delta_rule(
    pieces: dict[str, Any], number: int, inputs: Sequence[torch.Tensor], first: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a round; the last states are None without `keep`. See `RoundRule`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    query, key, value, decay, beta = inputs
    found: tuple[torch.Tensor, torch.Tensor] = chunk_gated_delta_rule(
        normalised(query),
        normalised(key),
        value,
        g=decay,
        beta=beta,
        initial_state=first,
        output_final_state=keep,
        cu_seqlens=pieces["round_bounds"][number],
        chunk_indices=pieces["round_chunks"][number],
    )
    return found


def norm(layer: Any, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Normalise attended values and gate them: [N, D], [N, D] -> [N, D]."""
    return gated_norm(attended, gate, layer.norm.weight, layer.norm.variance_epsilon)


KERNELS = Operations(convolve, rule, norm)
