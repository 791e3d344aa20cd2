"""Attention over cached keys and values: of packed prompts while they are read, and of one new token a row afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from qwen_vl_sft.inference.engine.cache import KeyValueCache
from qwen_vl_sft.modeling.attention import kernel_of
from qwen_vl_sft.modeling.attention_kernels import has_varlen_kernel, varlen_kernel
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

CACHED = "cached_rows"


class Step(Protocol):
    """What one forward pass of the language model attends to."""

    def attend(
        self, kernel: str, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the new keys and values and attend: q, k, v [T, heads, D] -> [T, heads, D]."""


@dataclass(frozen=True)
class PrefillStep:
    """Pieces of prompts one after another. A piece attends to what stands before it in its row, and to itself.

    `write` [T] are the slots of the new tokens; `read` [K] those of what each piece attends to, None where that is the
    new tokens themselves. `bounds_q`, `bounds_k` [S + 1] int32 are where pieces begin and end in T and in K.
    """

    cache: KeyValueCache
    write: torch.Tensor
    read: torch.Tensor | None
    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    longest_q: int
    longest_k: int

    def attend(
        self, kernel: str, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the new keys and values, and attend inside each piece."""
        self.cache.write(layer, self.write, k, v)
        if self.read is not None:
            k, v = (tensor.to(q.dtype) for tensor in self.cache.read(layer, self.read))
        if has_varlen_kernel(v):
            bounds = (self.bounds_q, self.bounds_k, self.longest_q, self.longest_k)
            return varlen_kernel(kernel)(q, k, v, *bounds, scale=scaling, causal=True)
        return attend_by_piece(q, k, v, self.bounds_q, self.bounds_k, scaling, causal=True)


@dataclass(frozen=True)
class DecodeStep:
    """One new token of each of B rows, which attends to the L slots of its row that are not masked, its own among them.

    `write` [B], `slots` [B, L]; `mask` [B, 1, 1, L] is 0 or minus infinity, in the cache's type.
    """

    cache: KeyValueCache
    write: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor

    def attend(
        self, kernel: str, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the new keys and values, and attend to each row's own."""
        self.cache.write(layer, self.write, k, v)
        rows, longest = self.slots.shape
        keys, values = (
            tensor.unflatten(0, (rows, longest)).transpose(1, 2)
            for tensor in self.cache.read(layer, self.slots.flatten())
        )
        # The queries that share a head of keys stand as its queries: [B, heads of keys, queries a head, D].
        queries = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=self.mask, scale=scaling)
        return attended.flatten(1, 2).to(q.dtype)


@dataclass(frozen=True)
class SlotStep:
    """One new token of each of B rows, which a kernel has attend to the slots of its row where they lie.

    `write` [B]; row b has the first `lengths[b]` + 1 of the slots `table[places[b]]`, its own the last of them.
    """

    cache: KeyValueCache
    write: torch.Tensor
    table: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor

    def attend(
        self, kernel: str, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Store the new keys and values, and attend to each row's own."""
        from qwen_vl_sft.inference.engine.decode_kernel import attend_to_slots

        self.cache.write(layer, self.write, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        attended = attend_to_slots(q.to(self.cache.dtype), keys, values, self.table, self.places, self.lengths, scaling)
        return attended.to(q.dtype)


@contextmanager
def cached_attention(language_model: Any) -> Iterator[None]:
    """Have the language model attend as the `step` that its forward is given says."""
    before = language_model.config._attn_implementation
    kernel = kernel_of(before)
    name = f"{CACHED}_{kernel}"
    AttentionInterface.register(name, partial(_attend, kernel))
    AttentionMaskInterface.register(name, _no_mask)
    # Not `set_attn_implementation`, which walks through all modules: this is done for each question of a demo.
    language_model.config._attn_implementation = name
    try:
        yield
    finally:
        language_model.config._attn_implementation = before


def _no_mask(**_: Any) -> None:
    return None


def _attend(
    kernel: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Step,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with all rows in one sequence: [1, heads, T, D] -> [1, T, heads, D]."""
    # Under autocast the rotary embedding leaves queries and keys in float32.
    q, k, v = (tensor.to(value.dtype)[0].transpose(0, 1) for tensor in (query, key, value))
    return step.attend(kernel, int(module.layer_idx), q, k, v, scaling)[None], None  # type: ignore[arg-type]
