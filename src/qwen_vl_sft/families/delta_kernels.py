"""Gated delta-net layers of packed sequences with the kernels of flash-linear-attention, compared with float32 first.

The rule (`chunk_gated_delta_rule`) takes the bounds of pieces and first states, and gives gradients for both
(https://github.com/fla-org/flash-linear-attention, 0.6.0). It is called so that a change of rows is no new call to tune:
Triton tunes by heads, by sizes and by which of the states there are. Convolution and norms are kernels of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from qwen_vl_sft.families import delta_gradient
from qwen_vl_sft.families.delta_convolution import convolved
from qwen_vl_sft.families.delta_norms import gated_norm, normalised
from qwen_vl_sft.families.gated_delta_net import TORCH, Operations, RoundRule, heads


def convolve(layer: Any, projected: torch.Tensor, pieces: dict[str, Any], before: torch.Tensor | None) -> torch.Tensor:
    """Convolve each piece behind the inputs before it: [1, T, C] -> [1, T, C]."""
    if layer.activation not in ("silu", "swish") or layer.conv1d.bias is not None:
        return TORCH.convolve(layer, projected, pieces, before)
    if before is not None:
        projected = torch.cat([projected, before.transpose(1, 2).flatten(0, 1)[None].to(projected.dtype)], dim=1)
    return convolved(projected, layer.conv1d.weight.squeeze(1), pieces)


def normalised_heads(layer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split what was convolved [1, T, C] into query, key and value [1, T, heads, D], the first two of length one."""
    query, key, value = heads(layer, mixed)
    return normalised(query), normalised(key), value


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
        query,
        key,
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


KERNELS = Operations(convolve, normalised_heads, rule, norm)
