"""Keys and values of every layer, one slot a token: rows share the slots of a prefix, and free slots are used again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch

from qwen_vl_sft.errors import UserError

# Free memory that the cache may take: the rest is for what a forward pass computes.
GPU_SHARE, CPU_SHARE = 0.5, 0.125
# Stands for no token: table entries behind the end of a row, and rows that only fill up a batch.
NO_TOKEN = 0
FULL = "full_attention"


class KeyValueCache:
    """Keys and values [slots, heads, width] of each layer of full attention, by its number. A row's tokens may lie anywhere.

    Args:
        config: configuration of the language model.
        slots: most tokens that are held at once.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(self, config: Any, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        layers = attention_layers(config)
        # One piece of memory: a GPU takes longer to give dozens of them.
        whole = _zeros((2, len(layers), slots + 1, config.num_key_value_heads, head_width(config)), dtype, device)
        self.keys, self.values = (dict(zip(layers, part, strict=True)) for part in whole)
        self.slots = slots
        self.dtype = dtype
        self.device = device
        # The lowest slots are taken first, so that memory of the CPU that is never needed is never touched.
        self._free = list(range(slots, NO_TOKEN, -1))

    @property
    def free(self) -> int:
        """Count the free slots."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take free slots; there must be as many."""
        assert count <= len(self._free), f"{count} slots of {len(self._free)} free ones"
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free += reversed(slots)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [T, heads, width] of T tokens."""
        self.keys[layer].index_copy_(0, slots, keys.to(self.dtype))
        self.values[layer].index_copy_(0, slots, values.to(self.dtype))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [T, heads, width] of T tokens."""
        return self.keys[layer].index_select(0, slots), self.values[layer].index_select(0, slots)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros: a slot that is masked counts with weight 0, which makes no zero of a NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # PyTorch would write every byte; NumPy's memory is zero when it is first read.
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def attention_layers(config: Any) -> list[int]:
    """Return the numbers of the layers with full attention. Raises `UserError` for layers whose attention has a window."""
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    if "sliding_attention" in kinds:
        raise UserError(
            "the model's configuration has layers of sliding attention (use_sliding_window), which are not answered with;"
            " set use_sliding_window to false in its config.json, as in all released Qwen-VL models"
        )
    return [layer for layer, kind in enumerate(kinds) if kind == FULL]


def head_width(config: Any) -> int:
    """Return the values of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def bytes_per_slot(config: Any, dtype: torch.dtype) -> int:
    """Return the memory of one token over all layers."""
    return 2 * int(len(attention_layers(config)) * config.num_key_value_heads) * head_width(config) * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, with those that PyTorch holds and does not use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def affordable_slots(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens the memory that is free now holds, with room for computing."""
    share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    return int(free_memory(device) * share) // bytes_per_slot(config, dtype)
