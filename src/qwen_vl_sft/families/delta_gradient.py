"""The part of the gated delta rule's backward pass that Triton 3.4 to 3.7.0 computes wrongly on Hopper, in our own kernel.

flash-linear-attention 0.6.0 raises there and names tilelang, which compiles this part with nvcc. Triton miscompiles a product
whose first factor is the transpose of another product (https://github.com/fla-org/flash-linear-attention/issues/640). This
kernel computes the scores of a chunk and their transpose by a product each, so that no product is transposed. It is
registered as one of flash-linear-attention's backends, and taken where tilelang is not installed. Sizes are fixed: nothing
is tuned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Values of a state that are in work at once.
_VALUES = 64
_WARPS = 8
_STAGES = 2


def register() -> None:
    """Offer this to flash-linear-attention, behind tilelang, where its own kernel raises."""
    from fla.backends import BaseBackend
    from fla.backends import register as offered
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    class TransposedScores(BaseBackend):  # type: ignore[misc]
        """The kernel of this module."""

        backend_type = "transposed_scores"
        default_enable = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
        env_var = "FLA_TRANSPOSED_SCORES"
        priority = 9

        def chunk_bwd_dqkwg_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            gated = kwargs.get("g") is not None and kwargs.get("w") is not None and kwargs.get("g_gamma") is None
            return (gated and not kwargs.get("state_v_first"), "another rule")

        def chunk_bwd_dqkwg(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            return chunk_gradients(**kwargs)

    offered("common")(TransposedScores)


# Another number of tokens compiles nothing.
@triton.jit(do_not_specialize=["tokens"])
def _gradients(
    q, k, v, do, dv, h, dh, g, dq, dk, dw, dg, bounds, chunks, scale, tokens,
    HEADS: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SIZE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    if PIECES:
        piece, number = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
        begin = tl.load(bounds + piece).to(tl.int64)
        length = tl.load(bounds + piece + 1).to(tl.int64) - begin
    else:
        count = tl.cdiv(tokens, SIZE)
        begin = (chunk // count).to(tl.int64) * tokens
        number, length = chunk % count, tokens
    inside = tl.arange(0, SIZE)
    there = number * SIZE + inside < length
    last = tl.minimum(length - number * SIZE, SIZE) - 1
    token = begin + number * SIZE + inside
    at_key = tl.arange(0, KEYS)
    of_head = token * (HEADS * SHARED) + head
    query_place = (token * HEADS + head // SHARED)[:, None] * K + at_key[None, :]
    key_place = of_head[:, None] * K + at_key[None, :]
    key_there = there[:, None] & (at_key < K)[None, :]
    state = (chunk.to(tl.int64) * (HEADS * SHARED) + head) * K * V

    of_query = tl.zeros([SIZE, KEYS], dtype=tl.float32)
    of_key = tl.zeros([SIZE, KEYS], dtype=tl.float32)
    of_w = tl.zeros([SIZE, KEYS], dtype=tl.float32)
    scores = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    transposed = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    of_end = 0.0
    for start in range(0, V, VALUES):
        at_value = start + tl.arange(0, VALUES)
        value_place = of_head[:, None] * V + at_value[None, :]
        value_there = there[:, None] & (at_value < V)[None, :]
        state_place = state + at_value[:, None] + at_key[None, :] * V
        state_there = (at_value < V)[:, None] & (at_key < K)[None, :]
        value = tl.load(v + value_place, mask=value_there, other=0.0)
        of_output = tl.load(do + value_place, mask=value_there, other=0.0)
        of_value = tl.load(dv + value_place, mask=value_there, other=0.0).to(value.dtype)
        before = tl.load(h + state_place, mask=state_there, other=0.0)
        of_behind = tl.load(dh + state_place, mask=state_there, other=0.0)
        of_end += tl.sum(before.to(tl.float32) * of_behind.to(tl.float32))
        before, of_behind = before.to(value.dtype), of_behind.to(value.dtype)
        scores = tl.dot(of_output, tl.trans(value), scores)
        transposed = tl.dot(value, tl.trans(of_output), transposed)
        of_query = tl.dot(of_output, before, of_query)
        of_key = tl.dot(value, of_behind, of_key)
        of_w = tl.dot(of_value, before, of_w)
    tl.store(dw + key_place, (-of_w).to(dw.dtype.element_ty), mask=key_there)

    logs = tl.load(g + of_head, mask=there, other=0.0)
    end = tl.load(g + (begin + number * SIZE + last) * (HEADS * SHARED) + head)
    query = tl.load(q + query_place, mask=key_there, other=0.0)
    key = tl.load(k + query_place, mask=key_there, other=0.0)
    of_query *= tl.exp2(logs)[:, None] * scale
    of_key *= tl.where(there, tl.exp2(end - logs), 0.0)[:, None]
    of_end = of_end * tl.exp2(end) + tl.sum(of_key * key.to(tl.float32))
    # Only tokens before see a token, and none behind the end is seen.
    both = there[:, None] & there[None, :]
    apart = logs[:, None] - logs[None, :]
    scores = tl.where(both & (inside[:, None] >= inside[None, :]), scores * tl.exp2(apart), 0.0) * scale
    transposed = tl.where(both & (inside[:, None] <= inside[None, :]), transposed * tl.exp2(-apart), 0.0) * scale
    of_query = tl.dot(scores.to(key.dtype), key, of_query)
    of_key = tl.dot(transposed.to(key.dtype), query, of_key)
    of_log = tl.sum(of_query * query.to(tl.float32), 1) - tl.sum(of_key * key.to(tl.float32), 1)
    of_log += tl.where(inside == last, of_end, 0.0)
    tl.store(dq + key_place, of_query.to(dq.dtype.element_ty), mask=key_there)
    tl.store(dk + key_place, of_key.to(dk.dtype.element_ty), mask=key_there)
    tl.store(dg + of_head, of_log, mask=there)


def chunk_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    h: torch.Tensor,
    dh: torch.Tensor,
    w: torch.Tensor,
    g: torch.Tensor,
    dv: torch.Tensor,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys, `w` and decay of a chunked gated delta rule, by its chunks' states.

    Args:
        q: [B, T, H, K], as k.
        k: [B, T, H, K].
        v: [B, T, HV, V] values after what the state knew was taken off, as do and dv, the gradients of output and of v.
        do: [B, T, HV, V].
        h: [B, N, HV, K, V] the state before each chunk.
        dh: [B, N, HV, K, V] the gradient of the state behind each chunk.
        w: [B, T, HV, K], of which only the type counts.
        g: [B, T, HV] logarithms of base 2 of the decay from the beginning of the chunk.
        dv: [B, T, HV, V].
        scale: of the queries.
        cu_seqlens: [S + 1] bounds of sequences, for B = 1.
        chunk_size: tokens of a chunk.
        chunk_indices: [N, 2] sequence and number of each chunk.

    Returns [B, T, H, K], the same, [B, T, HV, K] and [B, T, HV] float32.
    """
    batch, tokens, heads, keys = q.shape
    all_heads, values = v.shape[2:]
    shared = all_heads // heads
    q, k, v, do, dv, g, h, dh = (tensor.contiguous() for tensor in (q, k, v, do, dv, g, h, dh))
    dq, dk = (torch.empty(batch, tokens, all_heads, keys, dtype=one.dtype, device=q.device) for one in (q, k))
    dw, dg = torch.empty_like(dq, dtype=w.dtype), torch.empty_like(g, dtype=torch.float32)
    if cu_seqlens is None:
        count = batch * triton.cdiv(tokens, chunk_size)
    else:
        assert chunk_indices is not None, "whoever gives the bounds gives the chunks"
        count = len(chunk_indices)
    _gradients[(count, all_heads)](
        q, k, v, do, dv, h, dh, g, dq, dk, dw, dg, cu_seqlens, chunk_indices, scale, tokens,
        HEADS=heads, SHARED=shared, K=keys, V=values, SIZE=chunk_size, KEYS=triton.next_power_of_2(keys),
        VALUES=min(_VALUES, triton.next_power_of_2(values)), PIECES=cu_seqlens is not None,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    dq, dk = (one.unflatten(2, (heads, shared)).sum(3) if shared > 1 else one for one in (dq, dk))
    return dq, dk, dw, dg
