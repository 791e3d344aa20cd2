"""An MLP of FP8 layers as one function: between its products everything is FP8, and adapters add to what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qwen_vl_sft.modeling.fp8.adapters import AdapterPair, add, add_gradient, as_rows, gradients
from qwen_vl_sft.modeling.fp8.linear import INPUTS, FP8Linear, Normed, computed_type
from qwen_vl_sft.modeling.fp8.products import product
from qwen_vl_sft.modeling.fp8.weights import Quantized

# Rows that the backward pass takes at once, at most: the widest values of all rows are never there together.
CHUNK = 16384


def mlp(x: torch.Tensor, layers: Sequence[tuple[FP8Linear, AdapterPair | None]], kernels: Any) -> torch.Tensor:
    """Compute down(silu(gate(x)) * up(x)) of `x` [..., K] with the FP8 layers gate, up and down and their adapters."""
    first = layers[0][0].computation
    quantized, normed = INPUTS.of(x, first.quantize), INPUTS.norm_of(x)
    frozen = [part for layer, _ in layers for part in (layer.values, layer.scales.view(-1), layer.bias)]
    trained = [part for _, adapter in layers for part in (adapter[:2] if adapter else (None, None))]
    scalings = tuple(adapter.scaling if adapter else 0.0 for _, adapter in layers)
    return MLPProduct.apply(  # type: ignore[no-any-return]
        x, quantized, normed, kernels, first.emulated, scalings, *frozen, *trained
    )


class SwiGLUProduct(torch.autograd.Function):
    """silu(gate) * up, and its quantized form."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kernels: Any) -> Any:
        """Compute [..., I]."""
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        kept = torch.empty_like(gate)
        quantized = kernels.swiglu(as_rows(gate), as_rows(up), as_rows(kept))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*quantized)
        return kept, *quantized

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of gate and up."""
        if grads[0] is None:
            return (None,) * 3
        gate, up = ctx.saved_tensors
        found = ctx.kernels.swiglu_gradients(as_rows(grads[0]), as_rows(gate), as_rows(up))
        return *(grad.view(gate.shape) for grad in found), None


class MLPProduct(torch.autograd.Function):
    """A whole MLP; what is between its products is computed again.

    It keeps gate and up and, where these have adapters, x, or what a norm made x of, which its own gradient keeps too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantized: Quantized,
        normed: Normed | None,
        kernels: Any,
        emulated: bool,
        scalings: tuple[float, float, float],
        *parts: Any,
    ) -> torch.Tensor:
        """Compute `x` [..., K] -> [..., K].

        `parts` are values, scales and bias of gate, of up and of down, then A and B of each, None without an adapter.
        """
        layers: list[tuple[Any, Any, Any]] = [parts[:3], parts[3:6], parts[6:9]]  # type: ignore[list-item]
        gate_layer, up_layer, down_layer = layers
        dtype = computed_type(x)
        adapters = [None if part is None else part.to(dtype) for part in parts[9:]]
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        rows = as_rows(x).to(dtype) if a_gate is not None or a_up is not None else None
        # With autocast the adapters' products would be cast once more.
        with torch.autocast(x.device.type, enabled=False):
            gate = product(quantized, *gate_layer, emulated=emulated).to(dtype)
            up = product(quantized, *up_layer, emulated=emulated).to(dtype)
            in_gate = add(gate, rows, a_gate, b_gate, scalings[0])
            in_up = add(up, rows, a_up, b_up, scalings[1])
            kept = None if a_down is None else torch.empty_like(gate)
            found = product(kernels.swiglu(gate, up, kept), *down_layer, emulated=emulated).to(dtype)
            in_down = add(found, kept, a_down, b_down, scalings[2])
        frozen = (*gate_layer[:2], *up_layer[:2], *down_layer[:2])
        made_of = (rows, None, None) if rows is None or normed is None else normed
        ctx.save_for_backward(*made_of, gate, up, in_gate, in_up, in_down, *frozen, *adapters)
        ctx.kernels, ctx.emulated, ctx.scalings, ctx.input = kernels, emulated, scalings, (x.shape, x.dtype)
        ctx.trained = [None if part is None else part.dtype for part in parts[9:]]
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of x and of the adapters."""
        rows, rstd, weight, gate, up, in_gate, in_up, in_down, *saved = ctx.saved_tensors
        gate_values, gate_scales, up_values, up_scales, down_values, down_scales = saved[:6]
        a_gate, b_gate, a_up, b_up, a_down, b_down = saved[6:]
        kernels, emulated, scalings = ctx.kernels, ctx.emulated, ctx.scalings
        found: list[torch.Tensor | None] = [None] * 6
        grads_of_rows = as_rows(grads[0]).contiguous()
        x_grad = grads_of_rows.new_empty(len(gate), gate_values.shape[1], dtype=gate.dtype)
        with torch.autocast(gate.device.type, enabled=False):
            to_inner, to_x = kernels.transpose(down_values), kernels.transpose(gate_values, up_values)
            # Of one size, as products of few rows are slower.
            count = math.ceil(len(gate) / CHUNK)
            for number in range(count):
                part = slice(len(gate) * number // count, len(gate) * (number + 1) // count)
                grad, gate_part, up_part = grads_of_rows[part], gate[part], up[part]
                quantized = kernels.quantize_rows(grad, down_scales)
                inner = product(quantized, to_inner, None, None, emulated).to(gate.dtype)
                activated = None if a_down is None else torch.empty_like(gate_part)
                of_inside = None if a_down is None else add_gradient(inner, grad, b_down, scalings[2], a_down)
                kept = None if rows is None else (torch.empty_like(gate_part), torch.empty_like(up_part))
                # Both of one scale a row, so that one product adds up what goes to x.
                both = kernels.swiglu_backward(inner, gate_part, up_part, gate_scales, up_scales, kept, activated)
                del inner
                if activated is not None:
                    own = gradients(grad, activated, in_down[part], of_inside, scalings[2])
                    _accumulate(found, 4, own)
                    del activated
                of_x = product(both, to_x, None, None, emulated, out=x_grad[part])
                del both
                if kept is not None:
                    source = rows[part] if rstd is None else Normed(rows[part], rstd[part], weight)
                    for at, (inside, a, b) in enumerate(((in_gate, a_gate, b_gate), (in_up, a_up, b_up))):
                        if a is not None:
                            of_inside = add_gradient(of_x, kept[at], b, scalings[at], a)
                            own = gradients(kept[at], source, inside[part], of_inside, scalings[at])
                            _accumulate(found, 2 * at, own)
        shape, dtype = ctx.input
        trained = [None if one is None else one.to(kind) for one, kind in zip(found, ctx.trained, strict=True)]
        return x_grad.to(dtype).view(shape) if ctx.needs_input_grad[0] else None, *(None,) * 14, *trained


def _accumulate(found: list[torch.Tensor | None], at: int, parts: Sequence[torch.Tensor]) -> None:
    """Add gradients to those of the rows before, in float32."""
    for number, part in enumerate(parts, at):
        before = found[number]
        found[number] = part.float() if before is None else before.add_(part)
