"""A frozen linear layer and its adapter as one function, with gradients: sums are added by the matrix products themselves.

As layers of their own, autograd computes the gradient of their input for each and adds the two: a pass over three of the
widest activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.modeling.fp8.linear import computed_type

# bitsandbytes is not needed for others.
_IN_4_BITS = "Linear4bit"


def fits(base: Any, x: torch.Tensor) -> bool:
    """Return whether a layer is a linear one that does not learn and computes in the type of its input."""
    if "forward" in vars(base):
        # Its gradient is not that of its type, as with `fp8_gradients`.
        return False
    if type(base) is nn.Linear:
        dtype = base.weight.dtype
    elif type(base).__name__ == _IN_4_BITS:
        dtype = base.compute_dtype
    else:
        return False
    learns = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return not learns and dtype in (None, x.dtype) and x.dtype == computed_type(x)


def adapted(base: nn.Module, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return base(x) + scaling * x down^T up^T: `x` [..., in], `down` [r, in], `up` [out, r] -> [..., out]."""
    found: torch.Tensor = _Adapted.apply(x, down, up, base, scaling)
    return found


def _weight(base: Any) -> Callable[[], torch.Tensor]:
    """Return what gives the weight [out, in] of a frozen linear layer, from the parameter that it holds now."""
    weight = base.weight
    if type(base).__name__ != _IN_4_BITS:
        return lambda: weight
    from bitsandbytes.functional import dequantize_4bit

    # As bitsandbytes' own gradient does.
    state = weight.quant_state
    return lambda: dequantize_4bit(weight.view(-1, 1), state)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Module, scaling: float
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        result = base(rows)
        scaled = torch.mul(down, scaling, out=torch.empty_like(down, dtype=x.dtype))
        own = up.to(x.dtype)
        reduced = rows @ scaled.t()
        result.addmm_(reduced, own.t())
        ctx.save_for_backward(x, scaled, own, reduced)
        ctx.weight, ctx.scaling, ctx.types = _weight(base), scaling, (down.dtype, up.dtype)
        return result.view(*x.shape[:-1], len(up))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, scaled, own, reduced = ctx.saved_tensors
        grad, (of_x, of_down, of_up) = grads[0].flatten(0, -2), ctx.needs_input_grad[:3]
        found: list[torch.Tensor | None] = [None] * 5
        small = grad @ own
        if of_x:
            of_rows = grad @ ctx.weight().to(grad.dtype)
            found[0] = of_rows.addmm_(small, scaled).view(x.shape)
        if of_down:
            found[1] = (small.t() @ x.flatten(0, -2)).to(ctx.types[0]) * ctx.scaling
        if of_up:
            found[2] = (grad.t() @ reduced).to(ctx.types[1])
        return tuple(found)
