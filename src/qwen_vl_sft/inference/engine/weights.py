"""4-bit weights dequantized once for all forward passes, where the memory that is free holds a 16-bit copy of them.

bitsandbytes dequantizes a layer's weights anew in every pass of more than a few rows, which for one token of each row takes
several times as long as the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.inference.engine.cache import free_memory

# Share of the free memory that the copy may take, beside the cache that is there already.
WEIGHTS_SHARE = 0.5


@contextmanager
def dequantized_weights(model: nn.Module, device: torch.device) -> Iterator[int]:
    """Have all 4-bit layers multiply with weights that are dequantized once meanwhile; gives the bytes that these take.

    The products are those that bitsandbytes computes of many rows, bit for bit. Where memory is short, or a layer computes
    in another type than its weights were stored from, the layers are left as they are, and 0 is given.
    """
    layers = _layers_of_4_bits(model)
    needed = sum(_values(layer) * layer.compute_dtype.itemsize for layer in layers)
    if not layers or needed > free_memory(device) * WEIGHTS_SHARE:
        yield 0
        return
    before = {layer: vars(layer).get("forward") for layer in layers}
    try:
        # One piece of memory of each type: a GPU takes longer to give hundreds of them.
        room = {
            dtype: torch.empty(sum(_values(layer) for layer in of_type), dtype=dtype, device=device)
            for dtype, of_type in _by_type(layers).items()
        }
        for layer in layers:
            dtype = layer.compute_dtype
            weight, room[dtype] = room[dtype][: _values(layer)], room[dtype][_values(layer) :]
            layer.forward = partial(_multiply, layer, _dequantized(layer, weight))
        yield needed
    finally:
        for layer, forward in before.items():
            if forward is not None:
                layer.forward = forward
            elif "forward" in vars(layer):
                del layer.forward


def _layers_of_4_bits(model: nn.Module) -> list[Any]:
    """Return the 4-bit layers, none if one of them is not as a copy would compute it."""
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    return layers if all(_can_be_copied(layer) for layer in layers) else []


def _can_be_copied(layer: Any) -> bool:
    state = getattr(layer.weight, "quant_state", None)
    return (
        state is not None
        and state.dtype == layer.compute_dtype
        and len(state.shape) == 2
        # Packed by bitsandbytes for its kernel on CPUs, or stored the other way round by an old version.
        and not getattr(state, "packing_format_for_cpu", False)
        and tuple(state.shape) == (layer.out_features, layer.in_features)
    )


def _values(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def _by_type(layers: list[Any]) -> dict[torch.dtype, list[Any]]:
    found: dict[torch.dtype, list[Any]] = {}
    for layer in layers:
        found.setdefault(layer.compute_dtype, []).append(layer)
    return found


def _dequantized(layer: Any, room: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = room.view(layer.out_features, layer.in_features)
    weight.copy_(dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state))
    return weight


def _multiply(layer: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Compute what `Linear4bit` does: x [..., in] -> [..., out]. Autocast reaches the product there too."""
    bias = layer.bias if layer.bias is None else layer.bias.to(weight.dtype)
    return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
