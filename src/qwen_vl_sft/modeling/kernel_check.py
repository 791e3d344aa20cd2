"""Compare kernels with what they stand for before they are used: attention with float32, once for each shape of heads."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

logger = logging.getLogger(__name__)
# Tokens of three rows, and how many keys stand before each, as in a shared prefix: none is a multiple of a kernel's tile.
_TOKENS, _BEFORE = (70, 33, 129), (0, 40, 0)
# |a - b| / |b|. Half precision rounds to 0.4%, and once more in a gradient; a row that sees another is off by far more.
TOLERANCE = 2e-2


def is_right(difference: Callable[[], float], otherwise: str) -> bool:
    """Return whether a kernel of this package runs and differs from float32 by rounding alone.

    If not, a line says what is done `otherwise`, and why. `difference` runs it on an example and compares.
    """
    try:
        with told_as_user_error(f"{otherwise}: the kernel for it fails here"):
            apart = difference()
    except UserError as error:
        logger.warning("%s", error)
        return False
    if not apart <= TOLERANCE:
        logger.warning("%s: the kernel for it is %s off float32", otherwise, f"{apart:.1%}")
        return False
    return True


@contextmanager
def told_as_user_error(failure: str, way_out: str = "") -> Iterator[None]:
    """Raise `UserError` for whatever a compiler or a kernel raises inside, but not where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"{failure}: {first_line(error)[:200]}{way_out and f'; {way_out}'}") from error


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def farthest(distances: Iterable[float]) -> float:
    """Return the largest of some distances; NaN, which compares as neither larger nor smaller, is farther than any."""
    return max(distances, key=lambda one: math.inf if math.isnan(one) else one)


class CheckedKernel:
    """A `VarlenKernel` that computes a small example first when it meets a new shape of heads.

    Raises `UserError` on that first call when it fails there, or when output or gradients are wrong.
    """

    def __init__(self, name: str, kernel: Any) -> None:
        self.name = name
        self.kernel = kernel
        self.checked: set[Any] = set()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: Any, **options: Any) -> torch.Tensor:
        """Compute attention; see `VarlenKernel`."""
        # A frozen vision tower takes no gradients, and a kernel may have none for its heads.
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        shape = (q.shape[1:], k.shape[1:], q.dtype, options["causal"], learns)
        if shape not in self.checked:
            self._check(q, k, options["causal"], learns)
            self.checked.add(shape)
        return self.kernel(q, k, v, *bounds, **options)

    def _check(self, q: torch.Tensor, k: torch.Tensor, causal: bool, learns: bool) -> None:
        heads = f"{q.shape[1]} heads of {q.shape[2]} values, {k.shape[1]} of them with keys"
        way_out = "set attn_implementation: sdpa, which is PyTorch's own"
        with told_as_user_error(f"attn_implementation: {self.name} does not run here with {heads}", way_out):
            apart = difference(self.kernel, q, k, causal, learns)
        if not apart <= TOLERANCE:
            raise UserError(
                f"attn_implementation: {self.name} computes something else than attention with {heads}: it is"
                f" {apart:.1%} off float32; {way_out}"
            )


def difference(kernel: Any, q: torch.Tensor, k: torch.Tensor, causal: bool, learns: bool) -> float:
    """Return how far a kernel's output, and with `learns` its gradients, are from float32: the largest |a - b| / |b|.

    Of `q` and `k` [T, heads, D] only the heads, the dtype and the device count.
    """
    before = _BEFORE if causal else (0, 0, 0)
    keys = [tokens + more for tokens, more in zip(_TOKENS, before, strict=True)]
    # A separate generator, so that training's random numbers do not change.
    numbers = torch.Generator(q.device).manual_seed(0)
    shapes = [(sum(_TOKENS), *q.shape[1:]), *[(sum(keys), *k.shape[1:])] * 2, (sum(_TOKENS), *q.shape[1:])]
    *inputs, grad = (torch.randn(shape, generator=numbers, device=q.device).to(q.dtype) for shape in shapes)
    bounds = [torch.tensor([0, *sizes], device=q.device).cumsum(0).int() for sizes in (_TOKENS, keys)]

    def from_kernel(*tensors: torch.Tensor) -> torch.Tensor:
        return kernel(*tensors, *bounds, max(_TOKENS), max(keys), scale=None, causal=causal)

    def in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_by_piece(q.float(), k.float(), v.float(), bounds[0], bounds[1], scaling=None, causal=causal)

    # A checkpointed layer would take what is saved here for its own, and compute itself anew for the gradients of this.
    on_its_own = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.set_grad_enabled(learns), torch.autocast(q.device.type, enabled=False), on_its_own:
        found, wanted = (_outputs(function, inputs, grad if learns else None) for function in (from_kernel, in_float32))
    return farthest(distance(one, other) for one, other in zip(found, wanted, strict=True))


def _outputs(function: Any, inputs: list[torch.Tensor], grad: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the output of a function, and for a gradient of that the gradients of its inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *(() if grad is None else torch.autograd.grad(output, leaves, grad.to(output.dtype)))]
