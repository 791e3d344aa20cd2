"""An attention's q, k and v as one function: one product gives the gradient of their input, and adapters add to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.modeling.fp8.adapters import AdapterPair, as_rows, base_and_adapter
from qwen_vl_sft.modeling.fp8.linear import INPUTS, FP8Linear, Normed, computed_type
from qwen_vl_sft.modeling.fp8.products import product
from qwen_vl_sft.modeling.fp8.weights import Quantized

NAMES = ("q_proj", "k_proj", "v_proj")
Adapted = tuple[FP8Linear, AdapterPair | None]


def join_projections(model: nn.Module, kernels: Any) -> int:
    """Have q, k and v of each attention layer with an FP8 base compute together; return how many layers do.

    Args:
        model: the model, with its adapter.
        kernels: `CheckedKernels`, or the module `plain`.
    """
    count = 0
    for module in list(model.modules()):
        layers = [getattr(module, name, None) for name in NAMES]
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        if all(type(base) is FP8Linear and base.computation.forward and base.computation.backward for base in bases):
            joined = Joined(layers, kernels)  # type: ignore[arg-type]
            for number, layer in enumerate(layers):
                layer.forward = functools.partial(joined, number)  # type: ignore[union-attr, method-assign]
            count += 1
    return count


class Joined:
    """The forward of layers that are called one after another with one input: the first call computes all of them."""

    def __init__(self, layers: Sequence[nn.Module], kernels: Any) -> None:
        self.layers, self.kernels = layers, kernels
        self._alone = [layer.forward for layer in layers]
        # The newest input, and what is still to be asked for.
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def __call__(self, number: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute one of the layers."""
        if number == 0:
            self._outputs = self._compute(x) if not args and not kwargs and torch.is_grad_enabled() else {}
            # Kept while something is still to be asked for: no longer, as it is large.
            self._input = x if self._outputs else None
        if x is not self._input or number not in self._outputs:
            return self._alone[number](x, *args, **kwargs)  # type: ignore[no-any-return]
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output

    def _compute(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the outputs of all layers; none where one has an adapter that has to be computed otherwise."""
        found = [pair for pair in (base_and_adapter(layer, x) for layer in self.layers) if pair is not None]
        return dict(enumerate(projections(x, found, self.kernels))) if len(found) == len(self.layers) else {}


def projections(x: torch.Tensor, layers: Sequence[Adapted], kernels: Any) -> tuple[torch.Tensor, ...]:
    """Compute FP8 layers of one input `x` [..., K] and their adapters."""
    first = layers[0][0].computation
    quantized, normed = INPUTS.of(x, first.quantize), INPUTS.norm_of(x)
    frozen = [part for layer, _ in layers for part in (layer.values, layer.scales.view(-1), layer.bias)]
    trained = [part for _, adapter in layers for part in (adapter[:2] if adapter else (None, None))]
    scalings = [adapter.scaling if adapter else 0.0 for _, adapter in layers]
    return Projections.apply(  # type: ignore[no-any-return]
        x, quantized, normed, kernels, first.emulated, scalings, *frozen, *trained
    )


class Projections(torch.autograd.Function):
    """Layers of one input. Where they have adapters it keeps x, or what a norm made x of, which its gradient keeps too.

    The matrices A of all adapters are one, and each reads x, and adds to its gradient, once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        quantized: Quantized,
        normed: Normed | None,
        kernels: Any,
        emulated: bool,
        scalings: Sequence[float],
        *parts: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Compute each layer's output [..., N].

        `parts` are values, scales and bias of each layer, then A and B of each, None without an adapter.
        """
        count, dtype = len(scalings), computed_type(x)
        frozen, trained = parts[: 3 * count], parts[3 * count :]
        ranks = [0 if part is None else len(part) for part in trained[::2]]
        a = torch.cat([part for part in trained[::2] if part is not None]).to(dtype) if any(ranks) else None
        b = [None if part is None else part.to(dtype) for part in trained[1::2]]
        rows = None if a is None else as_rows(x).to(dtype)
        # With autocast the adapters' products would be cast once more.
        with torch.autocast(x.device.type, enabled=False):
            outputs = [
                product(quantized, *layer, emulated).to(dtype)
                for layer in zip(frozen[::3], frozen[1::3], frozen[2::3], strict=True)
            ]
            inside = None if rows is None or a is None else rows @ a.t()
            for output, own, up, scaling in zip(outputs, _parts(inside, ranks), b, scalings, strict=True):
                if own is not None and up is not None:
                    output.addmm_(own, up.t(), alpha=scaling)
        made_of = (rows, None, None) if rows is None or normed is None else normed
        ctx.save_for_backward(*made_of, inside, a, *b, *frozen[::3], *frozen[1::3])
        ctx.kernels, ctx.emulated, ctx.scalings, ctx.ranks = kernels, emulated, scalings, ranks
        ctx.input, ctx.trained = (x.shape, x.dtype), [None if part is None else part.dtype for part in trained]
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Compute the gradients of x and of the adapters."""
        rows, rstd, weight, inside, a, *saved = ctx.saved_tensors
        count, (shape, dtype) = len(ctx.scalings), ctx.input
        b, values, scales = (saved[at * count : (at + 1) * count] for at in range(3))
        of_outputs, x_grad = [as_rows(grad).contiguous() for grad in grads], None
        found: list[torch.Tensor | None] = [None] * (2 * count)
        with torch.autocast(grads[0].device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                # All of one scale a row, so that one product adds up what goes to x.
                quantized = ctx.kernels.quantize_together(of_outputs, scales)
                to_x = ctx.kernels.transpose(*values)
                x_grad = product(quantized, to_x, None, None, ctx.emulated).to(of_outputs[0].dtype)
            if a is not None:
                layers: list[Any] = list(zip(of_outputs, b, _parts(inside, ctx.ranks), ctx.scalings, strict=True))
                of_inside = torch.cat([(grad @ up) * scaling for grad, up, _, scaling in layers if up is not None], 1)
                if x_grad is not None:
                    x_grad.addmm_(of_inside, a)
                of_a = of_inside.t() @ rows if rstd is None else Normed(rows, rstd, weight).times(of_inside)
                found[::2] = _parts(of_a, ctx.ranks, 0)
                found[1::2] = [None if up is None else (grad.t() @ own) * scaling for grad, up, own, scaling in layers]
        trained = [None if one is None else one.to(kind) for one, kind in zip(found, ctx.trained, strict=True)]
        return None if x_grad is None else x_grad.to(dtype).view(shape), *(None,) * (5 + 3 * count), *trained


def _parts(tensor: torch.Tensor | None, sizes: Sequence[int], dim: int = 1) -> list[torch.Tensor | None]:
    """Split a tensor; a part of size 0 is None, and so are all of None."""
    if tensor is None:
        return [None] * len(sizes)
    return [part if size else None for part, size in zip(tensor.split(list(sizes), dim), sizes, strict=True)]
