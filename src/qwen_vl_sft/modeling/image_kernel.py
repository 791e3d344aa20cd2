"""A Triton kernel for the attention of a vision tower without gradients: inside each image, all patches to all.

A head of 80 values, as Qwen2-VL's and Qwen2.5-VL's towers have, is computed as 64 and 16: PyTorch's kernel pads it to 96,
others to 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Queries of a program, and keys of one of its steps.
_QUERIES, _KEYS = 128, 64
# The two parts in which the values of a head are computed.
_FIRST, _REST = 64, 16
_LOG2_E = 1.4426950408889634


@triton.jit
def _next(
    asked, asked_rest, k, v, token_k, token_v, key, last, most, total, found, found_rest, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys in the rows `key`; with `MASKED` to those before `last`."""
    at, rest = tl.arange(0, FIRST)[None, :], FIRST + tl.arange(0, REST)[None, :]
    of_k, of_v = k + key[:, None].to(tl.int64) * token_k, v + key[:, None].to(tl.int64) * token_v
    known = (key < last)[:, None]
    if MASKED:
        keys = tl.load(of_k + at, mask=known, other=0.0)
        keys_rest = tl.load(of_k + rest, mask=known & (rest < WIDTH), other=0.0)
        values = tl.load(of_v + at, mask=known, other=0.0)
        values_rest = tl.load(of_v + rest, mask=known & (rest < WIDTH), other=0.0)
    elif FIRST + REST == WIDTH:
        keys, keys_rest = tl.load(of_k + at), tl.load(of_k + rest)
        values, values_rest = tl.load(of_v + at), tl.load(of_v + rest)
    else:
        keys, keys_rest = tl.load(of_k + at), tl.load(of_k + rest, mask=rest < WIDTH, other=0.0)
        values, values_rest = tl.load(of_v + at), tl.load(of_v + rest, mask=rest < WIDTH, other=0.0)
    score = tl.dot(asked, tl.trans(keys))
    score = tl.dot(asked_rest, tl.trans(keys_rest), score)
    if MASKED:
        score = tl.where((key < last)[None, :], score, float("-inf"))
    higher = tl.maximum(most, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - higher[:, None])
    shrunk = tl.exp2(most - higher)
    total = total * shrunk + tl.sum(weight, 1)
    weight = weight.to(values.dtype)
    found = tl.dot(weight, values, found * shrunk[:, None])
    found_rest = tl.dot(weight, values_rest, found_rest * shrunk[:, None])
    return higher, total, found, found_rest


@triton.jit
def _attend(
    q, k, v, out, bounds, scale, token_q, token_k, token_v, head_q, head_k, head_v,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, segment = tl.program_id(1), tl.program_id(2)
    begin, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    query = begin + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    if begin + tl.program_id(0) * QUERIES >= last:
        return
    at, rest = tl.arange(0, FIRST)[None, :], FIRST + tl.arange(0, REST)[None, :]
    inside = (query < last)[:, None]
    of_q = q + query[:, None].to(tl.int64) * token_q + head * head_q
    asked = tl.load(of_q + at, mask=inside, other=0.0)
    asked_rest = tl.load(of_q + rest, mask=inside & (rest < WIDTH), other=0.0)
    k += head * head_k
    v += head * head_v
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, FIRST], tl.float32)
    found_rest = tl.zeros([QUERIES, REST], tl.float32)
    whole = begin + (last - begin) // KEYS * KEYS
    for first in range(begin, whole, KEYS):
        most, total, found, found_rest = _next(
            asked, asked_rest, k, v, token_k, token_v, first + tl.arange(0, KEYS), last, most, total, found, found_rest,
            scale, FIRST, REST, WIDTH, False,
        )  # fmt: skip
    if whole < last:
        most, total, found, found_rest = _next(
            asked, asked_rest, k, v, token_k, token_v, whole + tl.arange(0, KEYS), last, most, total, found, found_rest,
            scale, FIRST, REST, WIDTH, True,
        )  # fmt: skip
    of_out = out + (query[:, None].to(tl.int64) * tl.num_programs(1) + head) * WIDTH
    tl.store(of_out + at, (found / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(of_out + rest, (found_rest / total[:, None]).to(out.dtype.element_ty), mask=inside & (rest < WIDTH))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """Attend inside segments: q, k, v [T, heads, D] -> [T, heads, D]; `bounds` [S + 1] are where segments begin and end.

    A head has 65 to 80 values.
    """
    tokens, heads, width = q.shape
    # Fewer would be read beyond the end of a head, more left out.
    assert _FIRST < width <= _FIRST + _REST
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = torch.empty(tokens, heads, width, dtype=q.dtype, device=q.device)
    _attend[(triton.cdiv(longest, _QUERIES), heads, len(bounds) - 1)](
        q, k, v, out, bounds, (width**-0.5 if scale is None else scale) * _LOG2_E,
        q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
        WIDTH=width, FIRST=_FIRST, REST=_REST, QUERIES=_QUERIES, KEYS=_KEYS, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
