"""A Triton kernel for one new token of each row: it reads keys and values where they lie in the cache.

PyTorch's attention would first have them copied, row beside row, as wide as the longest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Keys of a step of a program: with 2 warps the fastest of 32, 64 and 128 on an H200.
_KEYS = 32
# So many programs keep all of a GPU's cores busy; rows are split into more parts until there are as many.
_PROGRAMS, MOST_PARTS = 528, 16
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_part(
    q, keys, values, table, places, lengths, out, partial, summed,
    scale, table_stride, q_row, q_head, slot_stride, head_stride,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lengths + row).to(tl.int32) + 1
    span = tl.cdiv(tl.cdiv(length, PARTS), KEYS) * KEYS
    start = part * span
    stop = tl.minimum(start + span, length)
    query, at = tl.arange(0, QUERIES), tl.arange(0, PADDED)
    inside = at < WIDTH
    own = (query < GROUP)[:, None] & inside[None, :]
    of_row = q + row.to(tl.int64) * q_row + (head * GROUP + query)[:, None] * q_head + at[None, :]
    asked = tl.load(of_row, mask=own, other=0.0)
    slots = table + tl.load(places + row) * table_stride
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, PADDED], tl.float32)
    for first in range(start, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        known = key < stop
        slot = tl.load(slots + key, mask=known, other=0)
        where = slot[:, None] * slot_stride + head * head_stride + at[None, :]
        read = known[:, None] & inside[None, :]
        k = tl.load(keys + where, mask=read, other=0.0)
        score = tl.where(known[None, :], tl.dot(asked, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrunk = tl.exp2(most - higher)
        v = tl.load(values + where, mask=read, other=0.0)
        found = tl.dot(weight.to(v.dtype), v, found * shrunk[:, None])
        total = total * shrunk + tl.sum(weight, 1)
        most = higher
    index = (row.to(tl.int64) * heads + head) * GROUP + query
    if PARTS == 1:
        tl.store(
            out + index[:, None] * WIDTH + at[None, :], (found / total[:, None]).to(out.dtype.element_ty), mask=own
        )
    else:
        index = index * PARTS + part
        tl.store(partial + index[:, None] * WIDTH + at[None, :], found, mask=own)
        # An empty part has seen nothing: its weight becomes 0.
        tl.store(summed + 2 * index, most, mask=query < GROUP)
        tl.store(summed + 2 * index + 1, total, mask=query < GROUP)


@triton.jit
def _join_parts(partial, summed, out, WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS), tl.arange(0, PADDED)
    index = query * PARTS + part
    most, total = tl.load(summed + 2 * index), tl.load(summed + 2 * index + 1)
    share = tl.exp2(most - tl.max(most, 0))
    found = tl.load(partial + index[:, None] * WIDTH + at[None, :], mask=(at < WIDTH)[None, :], other=0.0)
    joined = tl.sum(found * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + query * WIDTH + at, joined.to(out.dtype.element_ty), mask=at < WIDTH)


def attend_to_slots(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    places: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    parts: int | None = None,
) -> torch.Tensor:
    """Attend with one query of each row to the keys of its slots: q [B, heads, D] -> [B, heads, D].

    `keys`, `values` [slots, heads of keys, D]; row b reads the first `lengths[b]` + 1 of the slots in
    `table[places[b]]`, in so many `parts`, a power of two; None for as many as keep the GPU busy.
    """
    rows, heads, width = q.shape
    of_keys = keys.shape[1]
    group = heads // of_keys
    if parts is None:
        parts = 1
        while rows * of_keys * parts < _PROGRAMS and parts < MOST_PARTS:
            parts *= 2
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    partial = torch.empty(rows * heads * parts if parts > 1 else 0, width, dtype=torch.float32, device=q.device)
    summed = torch.empty(len(partial), 2, dtype=torch.float32, device=q.device)
    q = q if q.stride(-1) == 1 else q.contiguous()
    assert keys.stride() == values.stride()
    padded = max(16, triton.next_power_of_2(width))
    _attend_part[(rows, of_keys, parts)](
        q, keys, values, table, places, lengths, out, partial, summed,
        (width**-0.5 if scale is None else scale) * _LOG2_E,
        table.stride(0), q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
        GROUP=group, QUERIES=max(16, triton.next_power_of_2(group)), WIDTH=width, PADDED=padded,
        KEYS=_KEYS, PARTS=parts, num_warps=2, num_stages=4 if padded <= 128 else 2,
    )  # fmt: skip
    if parts > 1:
        _join_parts[(rows * heads,)](partial, summed, out, WIDTH=width, PADDED=padded, PARTS=parts, num_warps=4)
    return out
