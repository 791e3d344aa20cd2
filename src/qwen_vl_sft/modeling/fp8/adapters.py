"""What an adapter adds to the output of an FP8 layer and to the gradient of its input, in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_vl_sft.modeling.fp8.linear import FP8Linear, Normed


class AdapterPair(NamedTuple):
    """What LoRA adds to a layer: `scaling` * B A x, with A [r, in] and B [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def base_and_adapter(layer: nn.Module, x: torch.Tensor) -> tuple[FP8Linear, AdapterPair | None] | None:
    """Return an FP8 layer with what its one active adapter adds; None where it is another layer, or adds otherwise."""
    from peft.tuners.lora import LoraLayer

    if isinstance(layer, FP8Linear):
        return layer, None
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), FP8Linear):
        return None
    base: Any = layer.get_base_layer()
    if layer.disable_adapters:
        return base, None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.lora_variant or any(layer.lora_bias.values()):
        return None
    (name,) = active
    dropout: Any = layer.lora_dropout[name]
    down: Any = layer.lora_A[name].weight
    up: Any = layer.lora_B[name].weight
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if drops or not (torch.is_autocast_enabled(x.device.type) or x.dtype == down.dtype):
        return None
    return base, AdapterPair(down, up, layer.scaling[name])


def add(
    output: torch.Tensor,
    rows: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor | None:
    """Add scaling * B A x to a layer's output in place; return A x [M, r], None without an adapter."""
    if rows is None or a is None or b is None:
        return None
    inside = rows @ a.t()
    output.addmm_(inside, b.t(), alpha=scaling)
    return inside


def add_gradient(
    x_grad: torch.Tensor, grad: torch.Tensor, b: torch.Tensor, scaling: float, a: torch.Tensor
) -> torch.Tensor:
    """Add an adapter's part to the gradient of its input, from that of its output; return the gradient of A x."""
    of_inside = (grad @ b) * scaling
    x_grad.addmm_(of_inside, a)
    return of_inside


def gradients(
    grad: torch.Tensor, rows: torch.Tensor | Normed, inside: torch.Tensor, of_inside: Any, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of A and B from those of A x and of a layer's output."""
    of_a = rows.times(of_inside) if isinstance(rows, Normed) else of_inside.t() @ rows
    return of_a, (grad.t() @ inside) * scaling


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [..., K] as rows [M, K]."""
    return x.reshape(-1, x.shape[-1])
