"""Triton kernels of FP8 layers: what stands between two products is read once and written once, as FP8 values.

The functions that start them have the signatures of `weights` and `plain`, and their values to the bit, but for the last
bit of an exponential or a square root.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qwen_vl_sft.modeling.fp8.weights import E4M3, Quantized

# A row that is longer is read in parts, which a program keeps in its registers until it knows the scale of all. One block of
# the next power of two would leave many of them empty. The second is of rows of several tensors.
_LONGEST, _LONGEST_WIDE = 8192, 4096
# Values that a warp reads at once: eight, 16 bytes, a thread.
_OF_A_WARP = 256
_TILE = 128
# Rows of at most so many values, as the parts of a row that have a scale each, are quantized by so many in a program.
_SHORT, _SHORT_ROWS = 256, 32


@triton.jit
def _scale_bits(maximum):
    """Return the bits of the power of two that `weights.scale_of` returns, times 2^8."""
    bits = tl.maximum(maximum, 7.888609052210118e-31).to(tl.int32, bitcast=True)
    return (bits + 0x1FFFFF) & 0x7F800000


@triton.jit
def _scale(bits):
    return bits.to(tl.float32, bitcast=True) * 0.00390625


@triton.jit
def _inverse(bits):
    """Return 2^8 divided by the power of two of these bits, exactly."""
    return (0x7F000000 - bits).to(tl.float32, bitcast=True) * 256.0


@triton.jit
def _quantize_rows(
    x, columns, values, scales, stride, size, FOLD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    largest, held = tl.zeros([BLOCK], tl.float32), ()
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        if FOLD:
            part *= tl.load(columns + at, mask=at < size, other=0.0)
        largest = tl.maximum(largest, tl.abs(part))
        held += (part,)  # type: ignore[assignment]
    bits = _scale_bits(tl.max(largest, 0))
    inverse = _inverse(bits)
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        tl.store(values + row * size + at, (held[number] * inverse).to(tl.float8e4nv), mask=at < size)
    tl.store(scales + row, _scale(bits))


@triton.jit
def _quantize_short_rows(x, values, scales, stride, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (at < size)
    part = tl.load(x + row[:, None] * stride + at, mask=inside, other=0.0).to(tl.float32)
    bits = _scale_bits(tl.max(tl.abs(part), 1))
    tl.store(values + row[:, None] * size + at, (part * _inverse(bits)[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, _scale(bits), mask=row < rows)


@triton.jit
def _folded(x, columns, start, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    part = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    return part * tl.load(columns + start + at, mask=at < size, other=0.0)


@triton.jit
def _put(values, part, inverse, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(values + at, (part * inverse).to(tl.float8e4nv), mask=at < size)


@triton.jit
def _quantize_three(
    x, y, z, columns, values, scales, x_size, y_size, z_size, X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    size = x_size + y_size + z_size
    one = _folded(x + row * x_size, columns, 0, x_size, X)
    two = _folded(y + row * y_size, columns, x_size, y_size, Y)
    three = _folded(z + row * z_size, columns, x_size + y_size, z_size, Z)
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(one), 0), tl.max(tl.abs(two), 0)), tl.max(tl.abs(three), 0))
    bits = _scale_bits(largest)
    inverse = _inverse(bits)
    values += row * size
    _put(values, one, inverse, x_size, X)
    _put(values + x_size, two, inverse, y_size, Y)
    _put(values + x_size + y_size, three, inverse, z_size, Z)
    tl.store(scales + row, _scale(bits))


@triton.jit
def _rms_norm(x, weight, y, values, scales, rstd, size, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    part = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    one = tl.rsqrt(tl.sum(part * part, 0) / size + epsilon)
    tl.store(rstd + row, one)
    w = tl.load(weight + at, mask=inside, other=0.0)
    # Rounded before the weight is multiplied, as transformers does.
    normed = (w.to(tl.float32) * (part * one).to(w.dtype).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + row * size + at, normed, mask=inside)
    normed = normed.to(tl.float32)
    bits = _scale_bits(tl.max(tl.abs(normed), 0))
    tl.store(values + row * size + at, (normed * _inverse(bits)).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, _scale(bits))


@triton.jit
def _rms_norm_backward(grad, x, weight, rstd, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    one = tl.load(rstd + row)
    normed = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32) * one
    g = tl.load(grad + row * size + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(g * normed, 0) / size
    tl.store(out + row * size + at, (one * (g - normed * mean)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_product(gate, up, at, size):
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    return g * tl.sigmoid(g) * tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def _swiglu(gate, up, kept, values, scales, size, KEEP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest, held = tl.zeros([BLOCK], tl.float32), ()
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        part = _silu_product(gate + row * size, up + row * size, at, size)
        if KEEP:
            rounded = part.to(kept.dtype.element_ty)
            tl.store(kept + row * size + at, rounded, mask=at < size)
            part = rounded.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
        held += (part,)  # type: ignore[assignment]
    bits = _scale_bits(tl.max(largest, 0))
    inverse = _inverse(bits)
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        tl.store(values + row * size + at, (held[number] * inverse).to(tl.float8e4nv), mask=at < size)
    tl.store(scales + row, _scale(bits))


@triton.jit
def _swiglu_gradients(grad, gate, up, at, size):
    d = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    return d * u * (sigmoid + silu * (1 - sigmoid)), d * silu, silu * u


@triton.jit
def _swiglu_both_gradients(grad, gate, up, of_gate, of_up, size, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dg, du, _ = _swiglu_gradients(grad + start, gate + start, up + start, at, size)
    tl.store(of_gate + start + at, dg.to(of_gate.dtype.element_ty), mask=at < size)
    tl.store(of_up + start + at, du.to(of_up.dtype.element_ty), mask=at < size)


@triton.jit
def _swiglu_backward(
    grad,
    gate,
    up,
    gate_columns,
    up_columns,
    of_gate,
    of_up,
    product,
    values,
    scales,
    size,
    KEEP: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad += row * size
    gate += row * size
    up += row * size
    of_gate += row * size
    of_up += row * size
    values += row * size * 2
    largest, held = tl.zeros([BLOCK], tl.float32), ()
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        dg, du, both = _swiglu_gradients(grad, gate, up, at, size)
        if KEEP:
            tl.store(of_gate + at, dg.to(of_gate.dtype.element_ty), mask=at < size)
            tl.store(of_up + at, du.to(of_up.dtype.element_ty), mask=at < size)
        if PRODUCT:
            tl.store(product + row * size + at, both.to(product.dtype.element_ty), mask=at < size)
        dg *= tl.load(gate_columns + at, mask=at < size, other=0.0).to(tl.float32)
        du *= tl.load(up_columns + at, mask=at < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.maximum(tl.abs(dg), tl.abs(du)))
        held += (dg, du)  # type: ignore[assignment]
    bits = _scale_bits(tl.max(largest, 0))
    inverse = _inverse(bits)
    for number in tl.static_range(PARTS):
        at = number * BLOCK + tl.arange(0, BLOCK)
        tl.store(values + at, (held[2 * number] * inverse).to(tl.float8e4nv), mask=at < size)
        tl.store(values + size + at, (held[2 * number + 1] * inverse).to(tl.float8e4nv), mask=at < size)
    tl.store(scales + row, _scale(bits))


@triton.jit
def _transpose(values, out, rows, columns, stride, TILE: tl.constexpr):
    at_row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at_column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (at_row < rows)[:, None] & (at_column < columns)[None, :]
    tile = tl.load(values + at_row[:, None] * columns + at_column[None, :], mask=inside, other=0)
    to = out + at_column[:, None] * stride + at_row[None, :]
    tl.store(to, tl.trans(tile), mask=(at_column < columns)[:, None] & (at_row < rows)[None, :])


def quantize_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
    """Quantize rows in one pass; see `weights.quantize_rows`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, size = x.shape
    values, scales = _empty(x, rows, size)
    if size <= _SHORT and columns is None:
        sizes = {"ROWS": _SHORT_ROWS, "BLOCK": triton.next_power_of_2(size)}
        grid = (triton.cdiv(rows, _SHORT_ROWS),)
        _quantize_short_rows[grid](x, values, scales, x.stride(0), rows, size, **sizes, num_warps=8)
        return Quantized(values, scales)
    block, parts, warps = _blocks(size, _LONGEST)
    _quantize_rows[(rows,)](
        x,
        x if columns is None else columns,
        values,
        scales,
        x.stride(0),
        size,
        FOLD=columns is not None,
        BLOCK=block,
        PARTS=parts,
        num_warps=warps,
    )
    return Quantized(values, scales)


def quantize_together(parts: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> Quantized:
    """Quantize three parts of rows side by side; see `plain.quantize_together`."""
    sizes = [part.shape[1] for part in parts]
    values, scales = _empty(parts[0], len(parts[0]), sum(sizes))
    blocks = dict(zip("XYZ", map(triton.next_power_of_2, sizes), strict=True))
    warps = min(16, max(1, triton.next_power_of_2(sum(sizes)) // 512))
    numbers = torch.cat(list(columns))
    _quantize_three[(len(scales),)](*parts, numbers, values, scales, *sizes, **blocks, num_warps=warps)
    return Quantized(values, scales)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, Quantized, torch.Tensor]:
    """Normalise rows [M, K] of at most 8,192 values: return them, their quantized form, and 1 / their root mean square."""
    rows, size = x.shape
    y, rstd = (
        torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype)),
        x.new_empty(rows, dtype=torch.float32),
    )
    values, scales = _empty(x, rows, size)
    block, _, warps = _blocks(size, _LONGEST)
    _rms_norm[(rows,)](x, weight, y, values, scales, rstd, size, epsilon, BLOCK=block, num_warps=warps)
    return y, Quantized(values, scales), rstd


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the rows that `rms_norm` took."""
    out, size = torch.empty_like(x), x.shape[1]
    block, _, warps = _blocks(size, _LONGEST)
    _rms_norm_backward[(len(x),)](grad, x, weight, rstd, out, size, BLOCK=block, num_warps=warps)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor, kept: torch.Tensor | None = None) -> Quantized:
    """Return silu(gate) * up of rows [M, I], quantized; written to `kept` as well, from which it is then quantized."""
    rows, size = gate.shape
    values, scales = _empty(gate, rows, size)
    block, parts, warps = _blocks(size, _LONGEST_WIDE)
    _swiglu[(rows,)](
        gate,
        up,
        gate if kept is None else kept,
        values,
        scales,
        size,
        KEEP=kept is not None,
        BLOCK=block,
        PARTS=parts,
        num_warps=warps,
    )
    return Quantized(values, scales)


def swiglu_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up [M, I] from that of silu(gate) * up, in their type."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    rows, size = gate.shape
    block = min(_LONGEST_WIDE, triton.next_power_of_2(size))
    _swiglu_both_gradients[(rows, triton.cdiv(size, block))](
        grad.contiguous(), gate, up, of_gate, of_up, size, BLOCK=block, num_warps=8
    )
    return of_gate, of_up


def swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_columns: torch.Tensor,
    up_columns: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    activated: torch.Tensor | None = None,
) -> Quantized:
    """Return the gradients of gate and up, quantized; see `plain.swiglu_backward`.

    The numbers of the columns are powers of two, which are exact in bfloat16: every row reads all of them.
    """
    rows, size = gate.shape
    values, scales = _empty(gate, rows, 2 * size)
    block, parts, warps = _blocks(size, _LONGEST_WIDE, kept=2 if kept is None and activated is None else 3)
    _swiglu_backward[(rows,)](
        grad,
        gate,
        up,
        gate_columns.to(torch.bfloat16),
        up_columns.to(torch.bfloat16),
        *(kept or (gate, up)),
        gate if activated is None else activated,
        values,
        scales,
        size,
        KEEP=kept is not None,
        PRODUCT=activated is not None,
        BLOCK=block,
        PARTS=parts,
        num_warps=warps,
    )
    return Quantized(values, scales)


def transpose(*parts: torch.Tensor) -> torch.Tensor:
    """Return the transposes of e4m3 weights [N, K] side by side, [K, sum of N], contiguous."""
    columns, total = parts[0].shape[1], sum(len(part) for part in parts)
    out, start = torch.empty(columns, total, dtype=torch.uint8, device=parts[0].device), 0
    for part in parts:
        grid = (triton.cdiv(len(part), _TILE), triton.cdiv(columns, _TILE))
        _transpose[grid](part.view(torch.uint8), out[:, start:], len(part), columns, total, TILE=_TILE, num_warps=8)
        start += len(part)
    return out.view(E4M3)


def _empty(like: torch.Tensor, rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return like.new_empty(rows, size, dtype=E4M3), like.new_empty(rows, 1, dtype=torch.float32)


def _blocks(size: int, longest: int, kept: int = 1) -> tuple[int, int, int]:
    """Return how many values of a row are read at once, how often, and by how many warps.

    Up to `longest` they are read at once. A program keeps one number of each value, or two, or more while it also writes
    others. Of 8, 16 and 32 warps these were the fastest on an H200, for 4,864 to 29,568 values.
    """
    whole = triton.next_power_of_2(size)
    if whole <= longest:
        return whole, 1, min(16, max(1, whole // 512))
    if size <= 10_240:
        warps = 8
    elif kept == 1:
        warps = 16 if size <= 20_480 else 32
    else:
        # Of two numbers 32 warps have registers for three parts.
        warps = 32 if kept == 2 and 16_384 < size <= 24_576 else 16
    return _OF_A_WARP * warps, triton.cdiv(size, _OF_A_WARP * warps), warps
