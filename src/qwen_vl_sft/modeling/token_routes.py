"""Move the tokens of a layer to the experts that they choose and back, and activate what is between the two products.

A token's weight for an expert is multiplied into the activation, which is narrower than the expert's output, and of which
the second product is a linear function. The sum over a token's experts is the adjoint of its copies to them: each is the
other's gradient, and no gradient is added up in an order that changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.kernel_check import distance, farthest, told_as_user_error

# Tokens, experts and choices of an example: no multiple of anything.
_TOKENS, _EXPERTS, _CHOICES = 19, 5, 3
# |a - b| / |b|. Half precision rounds to 0.4%, and PyTorch's own operations between each two.
TOLERANCE = 2e-2


class Route(NamedTuple):
    """Where the choices of T tokens go, S = T * `choices` places in all.

    Attributes:
        choices: experts of a token.
        order: the number of the choice at each place [S], token * choices + its rank; the experts stand in their order.
        tokens: the token at each place [S].
        places: the place of each choice [S].
        ends: the place at which each expert ends [E] int32.
    """

    choices: int
    order: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor


def route(chosen: torch.Tensor, experts: int) -> Route:
    """Sort the choices [T, k] of tokens by expert. Nothing waits for the GPU."""
    numbers, order = chosen.flatten().sort(stable=True)
    every = torch.arange(experts, device=chosen.device, dtype=numbers.dtype)
    ends = torch.searchsorted(numbers, every, right=True, out_int32=True)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return Route(chosen.shape[-1], order, order // chosen.shape[-1], places, ends)


class Plain:
    """The functions of `expert_kernels` in PyTorch's own operations."""

    def spread(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the rows `at` [S] of `tokens` [T, H] -> [S, H]."""
        return tokens.index_select(0, at)

    def summed(self, rows: torch.Tensor, places: torch.Tensor, choices: int) -> torch.Tensor:
        """Return for each token the sum of the rows [S, H] at its `choices` places, of `places` [T * choices] -> [T, H]."""
        return rows.index_select(0, places).view(-1, choices, rows.shape[-1]).sum(1, dtype=rows.dtype)

    def gated(self, widened: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up * weight of gates and ups side by side [S, 2 I] and `weights` [S] -> [S, I]."""
        gate, up = widened.chunk(2, dim=-1)
        return F.silu(gate) * up * weights[:, None]

    def gated_gradients(
        self, grad: torch.Tensor, widened: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of what `gated` takes from that of its output [S, I]."""
        with torch.enable_grad():
            taken = widened.detach().requires_grad_(), weights.detach().requires_grad_()
            return torch.autograd.grad(self.gated(*taken), taken, grad)  # type: ignore[return-value]


class Checked:
    """The functions of `expert_kernels`. Each computes a small example first when it meets a new size.

    Raises `UserError` on that first call when it fails there, or computes something else than `Plain`.
    """

    def __init__(self) -> None:
        self.checked: set[Any] = set()

    def spread(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Copy tokens to their places; see `Plain.spread`."""

        def example(route: Route, size: int) -> Any:
            return _numbers(tokens, _TOKENS, size), route.tokens

        return self._call("spread", tokens.shape[1], (tokens, at), example)

    def summed(self, rows: torch.Tensor, places: torch.Tensor, choices: int) -> torch.Tensor:
        """Sum up what comes back to each token; see `Plain.summed`."""

        def example(route: Route, size: int) -> Any:
            return _numbers(rows, len(route.places), size), route.places, route.choices

        return self._call("summed", rows.shape[1], (rows, places, choices), example)

    def gated(self, widened: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Activate; see `Plain.gated`."""

        def example(route: Route, size: int) -> Any:
            return _numbers(widened, len(route.places), size), _numbers(weights, len(route.places), 1)[:, 0]

        return self._call("gated", widened.shape[1], (widened, weights), example)

    def gated_gradients(
        self, grad: torch.Tensor, widened: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradients of an activation; see `Plain.gated_gradients`."""

        def example(route: Route, size: int) -> Any:
            count = len(route.places)
            return (
                _numbers(grad, count, size // 2).flip(1),
                _numbers(widened, count, size),
                _numbers(weights, count, 1)[:, 0],
            )

        return self._call("gated_gradients", widened.shape[1], (grad, widened, weights), example)

    def _call(self, name: str, size: int, arguments: tuple[Any, ...], example: Callable[[Route, int], Any]) -> Any:
        from qwen_vl_sft.modeling import expert_kernels

        kernel = getattr(expert_kernels, name)
        first = arguments[0]
        key = name, size, first.device, *(one.dtype for one in arguments if isinstance(one, torch.Tensor))
        if key not in self.checked:
            self._check(name, kernel, example(_example_route(first.device), size))
            self.checked.add(key)
        return kernel(*arguments)

    def _check(self, name: str, kernel: Any, example: tuple[Any, ...]) -> None:
        way_out = "leave experts out of fused_kernels"
        with told_as_user_error(f"fused_kernels: experts ({name}) does not run here", way_out):
            found, wanted = kernel(*example), getattr(Plain(), name)(*example)
            pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
            apart = farthest(distance(one, other) for one, other in pairs)
        if not apart <= TOLERANCE:
            raise UserError(f"fused_kernels: experts ({name}) is {apart:.1%} off PyTorch's own operations; {way_out}")


class Spread(torch.autograd.Function):
    """Copies of tokens [T, H] at the places of their choices [S, H]."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, route: Route, kernels: Any) -> torch.Tensor:
        """Copy."""
        ctx.save_for_backward(route.places)
        ctx.choices, ctx.kernels = route.choices, kernels
        return kernels.spread(tokens, route.tokens)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Sum up the gradients of a token's copies."""
        (places,) = ctx.saved_tensors
        return ctx.kernels.summed(gradients[0], places, ctx.choices), None, None


class Gather(torch.autograd.Function):
    """The sums [T, H] of what each token's experts have made at the places of its choices [S, H]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, route: Route, kernels: Any) -> torch.Tensor:
        """Sum up."""
        ctx.save_for_backward(route.tokens)
        ctx.kernels = kernels
        return kernels.summed(rows, route.places, route.choices)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Copy the gradient of a token to its places."""
        (tokens,) = ctx.saved_tensors
        return ctx.kernels.spread(gradients[0], tokens), None, None


class Gated(torch.autograd.Function):
    """silu(gate) * up * weight, of gates and ups side by side [S, 2 I] and weights [S] -> [S, I]."""

    @staticmethod
    def forward(ctx: Any, widened: torch.Tensor, weights: torch.Tensor, kernels: Any) -> torch.Tensor:
        """Compute [S, I]."""
        ctx.save_for_backward(widened, weights)
        ctx.kernels = kernels
        return kernels.gated(widened, weights)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute both gradients."""
        return *ctx.kernels.gated_gradients(gradients[0], *ctx.saved_tensors), None


def _example_route(device: torch.device) -> Route:
    return route(torch.arange(_TOKENS * _CHOICES, device=device).view(_TOKENS, _CHOICES) * 7 % _EXPERTS, _EXPERTS)


def _numbers(like: torch.Tensor, rows: int, size: int) -> torch.Tensor:
    """Return random rows with a generator of their own, so that training's random numbers do not change."""
    generator = torch.Generator(like.device).manual_seed(rows + size)
    return torch.randn(rows, size, generator=generator, device=like.device).to(like.dtype)
