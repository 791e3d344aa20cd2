"""The part of the gated delta rule's backward pass that Triton 3.4 to 3.7.0 computes wrongly on Hopper, in matrix products.

flash-linear-attention 0.6.0 raises there and names tilelang, which compiles this part with nvcc
(https://github.com/fla-org/flash-linear-attention/issues/640). With tilelang installed its kernel is taken; without it
this, which needs neither. It is registered as one of flash-linear-attention's backends.
"""

from __future__ import annotations

from typing import Any

import torch

# Chunks computed at once: what is held meanwhile grows with them.
_AT_ONCE = 256


def register() -> None:
    """Offer this to flash-linear-attention, behind tilelang, where its own kernel raises."""
    from fla.backends import BaseBackend
    from fla.backends import register as offered
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    class Products(BaseBackend):  # type: ignore[misc]
        """Matrix products of PyTorch."""

        backend_type = "pytorch_products"
        default_enable = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
        env_var = "FLA_PYTORCH_PRODUCTS"
        priority = 9

        def chunk_bwd_dqkwg_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            gated = kwargs.get("g") is not None and kwargs.get("w") is not None and kwargs.get("g_gamma") is None
            return (gated and not kwargs.get("state_v_first"), "another rule")

        def chunk_bwd_dqkwg(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            with torch.autocast(kwargs["q"].device.type, enabled=False):
                return chunk_gradients(**kwargs)

    offered("common")(Products)


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
    batch, tokens, heads = q.shape[:3]
    places, valid = _places(batch, tokens, cu_seqlens, chunk_size, chunk_indices, q.device)
    shared = v.shape[2] // heads
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v, do, dv, g)]
    states, gradients = h.flatten(0, 1), dh.flatten(0, 1)
    parts = []
    for start in range(0, len(places), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        queries, keys, *own = (_gathered(tensor, places[part], valid[part]) for tensor in flat)
        own = [*(tensor.repeat_interleave(shared, dim=1) for tensor in (queries, keys)), *own]
        parts.append(_of_chunks(valid[part], scale, states[part], gradients[part], *own))
    # Every token is in one chunk: where it stands among all places of all chunks.
    total, count = batch * tokens, places.numel()
    back = torch.empty(total + 1, dtype=torch.long, device=q.device)
    back.scatter_(0, places.where(valid, total).flatten(), torch.arange(count, device=q.device))
    dq, dk, dw, dg = (
        torch.cat(found).transpose(1, 2).flatten(0, 1).index_select(0, back[:total]).unflatten(0, (batch, tokens))
        for found in zip(*parts, strict=True)
    )
    dq, dk = (one.unflatten(2, (heads, shared)).sum(3) for one in (dq, dk))
    return dq.to(q.dtype), dk.to(k.dtype), dw.to(w.dtype), dg


def _places(
    batch: int,
    tokens: int,
    bounds: torch.Tensor | None,
    size: int,
    chunks: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the position of each token of each chunk among all [N, chunk], and which there are."""
    inside = torch.arange(size, device=device)
    if bounds is None:
        count = -(-tokens // size)
        own = (torch.arange(count, device=device)[:, None] * size + inside).repeat(batch, 1)
        first = torch.arange(batch, device=device).repeat_interleave(count, output_size=batch * count) * tokens
        ends = torch.full_like(first, tokens)
    else:
        assert chunks is not None, "whoever gives the bounds gives the chunks"
        first, last = bounds[:-1][chunks[:, 0]].long(), bounds[1:][chunks[:, 0]].long()
        own, ends = chunks[:, 1:].long() * size + inside, last - first
    valid = own < ends[:, None]
    return (first[:, None] + own).where(valid, 0), valid


def _gathered(tensor: torch.Tensor, places: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Take [T, heads, ...] apart into chunks, with zeros behind the end of a sequence: [N, heads, chunk, ...]."""
    found = tensor.index_select(0, places.flatten()).unflatten(0, places.shape)
    outside = ~valid.reshape(*valid.shape, *[1] * (found.dim() - 2))
    return found.masked_fill(outside, 0).transpose(1, 2).contiguous()


def _of_chunks(
    valid: torch.Tensor,
    scale: float,
    h: torch.Tensor,
    dh: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    dv: torch.Tensor,
    g: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Compute chunks [N, heads, chunk, D] by their states [N, heads, K, V]; all but products in float32."""
    # The decay of all of a chunk, also of one that ends early.
    last = g.gather(2, (valid.sum(1) - 1)[:, None, None].expand(-1, g.shape[1], 1))
    decay, rest = g.exp2()[..., None], (last - g).where(valid[:, None], 0).exp2()[..., None]
    dq = _product(do, h.mT) * (decay * scale)
    dk = _product(v, dh.mT) * rest
    dw = -_product(dv, h.mT)
    dlast = _product(h.flatten(2)[:, :, None], dh.flatten(2)[..., None])[..., 0] * last.exp2()
    dlast = dlast + (dk * k).sum((-2, -1))[..., None]
    # Only tokens before see a token; the exponential of others would overflow.
    apart = (g[..., :, None] - g[..., None, :]).tril().exp2()
    scores = ((_product(do, v.mT) * apart).tril() * scale).to(k.dtype)
    dq = dq + _product(scores, k)
    dk = dk + _product(scores.mT, q)
    dg = (dq * q).sum(-1) - (dk * k).sum(-1)
    dg = dg.scatter_add(2, (valid.sum(1) - 1)[:, None, None].expand(-1, g.shape[1], 1), dlast)
    return dq, dk, dw, dg


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Multiply [N, heads, A, B] and [N, heads, B, C], adding up and giving float32, or what is wider."""
    other = other.to(one.dtype)
    if one.dtype in (torch.float32, torch.float64):
        return one @ other
    left, right = one.flatten(0, 1), other.flatten(0, 1)
    found = torch.bmm(left, right, out_dtype=torch.float32) if one.is_cuda else left.float() @ right.float()
    return found.unflatten(0, one.shape[:2])
