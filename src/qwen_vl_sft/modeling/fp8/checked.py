"""Compare the kernels of FP8 layers with PyTorch's own operations, once for each size, before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.fp8 import kernels, plain, weights
from qwen_vl_sft.modeling.fp8.weights import E4M3, Quantized
from qwen_vl_sft.modeling.kernel_check import distance, farthest, told_as_user_error

# No multiple of anything.
_ROWS = 37
# |a - b| / |b|. A value that an exponential's last bit has rounded the other way is off by 12.5%, and few are; a sum in
# another order rounds 16-bit values by 0.4%.
TOLERANCE = 1e-2


class CheckedKernels:
    """The functions of `kernels`. Each computes a small example first when it meets a new size.

    Raises `UserError` on that first call when it fails there, or computes something else than `plain`.
    """

    def __init__(self) -> None:
        self.checked: set[Any] = set()

    def quantize_rows(self, x: torch.Tensor, columns: torch.Tensor | None = None) -> Quantized:
        """Quantize rows; see `weights.quantize_rows`."""

        def examples() -> Any:
            own = _numbers(x, x.shape[1])
            return (own, None if columns is None else _columns(own))

        self._check("quantize", (x.shape[1], x.dtype, columns is None), "quantize_rows", weights, x, examples)
        return kernels.quantize_rows(x, columns)

    def quantize_together(self, parts: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> Quantized:
        """Quantize rows side by side; see `plain.quantize_together`."""

        def examples() -> Any:
            own = [_numbers(part, part.shape[1]).flip(0) for part in parts]
            return own, [_columns(part) for part in own]

        key = *(part.shape[1] for part in parts), parts[0].dtype
        self._check("projections", key, "quantize_together", plain, parts[0], examples)
        return kernels.quantize_together(parts, columns)

    def transpose(self, *parts: torch.Tensor) -> torch.Tensor:
        """Transpose weights; see `plain.transpose`."""

        def examples() -> Any:
            return tuple(_numbers(part, part.shape[1], rows=80).to(E4M3) for part in parts)

        shape = tuple(part.shape[1] for part in parts)
        self._check("transpose", shape, "transpose", plain, parts[0], examples)
        return kernels.transpose(*parts)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, Quantized, torch.Tensor]:
        """Normalise rows; see `plain.rms_norm`."""

        def examples() -> Any:
            return _numbers(x, x.shape[1]), _numbers(x, x.shape[1])[0].to(weight.dtype), epsilon

        self._check("rms_norm", (x.shape[1], x.dtype, weight.dtype), "rms_norm", plain, x, examples)
        return kernels.rms_norm(x, weight, epsilon)

    def rms_norm_backward(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of rows that were normalised."""

        def examples() -> Any:
            one, other = _numbers(x, x.shape[1]), _numbers(x, x.shape[1])
            own = torch.rsqrt(other.float().square().mean(1))
            return one.to(grad.dtype), other, one[0].to(weight.dtype), own

        key = x.shape[1], x.dtype, weight.dtype, grad.dtype
        self._check("rms_norm", key, "rms_norm_backward", plain, x, examples)
        return kernels.rms_norm_backward(grad, x, weight, rstd)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, kept: torch.Tensor | None = None) -> Quantized:
        """Return silu(gate) * up, quantized; see `plain.swiglu`."""

        def examples() -> Any:
            one, other = _numbers(gate, gate.shape[1]), _numbers(gate, gate.shape[1])
            return one, other.flip(0), None if kept is None else torch.empty_like(one)

        self._check("mlp", (gate.shape[1], gate.dtype, kept is None), "swiglu", plain, gate, examples)
        return kernels.swiglu(gate, up, kept)

    def swiglu_gradients(
        self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of gate and up; see `plain.swiglu_gradients`."""

        def examples() -> Any:
            own = _numbers(gate, gate.shape[1])
            return own.flip(1).to(grad.dtype), own, own.flip(0)

        self._check("mlp", (gate.shape[1], gate.dtype, grad.dtype), "swiglu_gradients", plain, gate, examples)
        return kernels.swiglu_gradients(grad, gate, up)

    def swiglu_backward(
        self,
        grad: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_columns: torch.Tensor,
        up_columns: torch.Tensor,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
        activated: torch.Tensor | None = None,
    ) -> Quantized:
        """Return the gradients of gate and up, quantized; see `plain.swiglu_backward`."""

        def examples() -> Any:
            own = _numbers(gate, gate.shape[1])
            written = None if kept is None else (torch.empty_like(own), torch.empty_like(own))
            product = None if activated is None else torch.empty_like(own)
            return own.flip(1), own, own.flip(0), _columns(own), _columns(own).flip(0), written, product

        key = gate.shape[1], gate.dtype, kept is None, activated is None
        self._check("mlp", key, "swiglu_backward", plain, gate, examples)
        return kernels.swiglu_backward(grad, gate, up, gate_columns, up_columns, kept, activated)

    def _check(
        self, switch: str, key: Any, name: str, reference: Any, like: torch.Tensor, examples: Callable[[], Any]
    ) -> None:
        if (name, key, like.device) in self.checked:
            return
        way_out = f"leave {switch} out of fp8_kernels"
        with told_as_user_error(f"fp8_kernels: {name} does not run here", way_out):
            # Each writes to tensors of its own, which are compared too.
            mine, theirs = examples(), examples()
            found, wanted = (getattr(kernels, name)(*mine), mine), (getattr(reference, name)(*theirs), theirs)
            pairs = zip(_tensors(found), _tensors(wanted), strict=True)
            apart = farthest(distance(one, other) for one, other in pairs)
        if not apart <= TOLERANCE:
            raise UserError(f"fp8_kernels: {name} is {apart:.1%} off PyTorch's own operations here; {way_out}")
        self.checked.add((name, key, like.device))


def _tensors(found: Any) -> list[torch.Tensor]:
    """Return what a function gave, a quantized one as the numbers it stands for."""
    if isinstance(found, Quantized):
        return [found.values.float() * found.scales]
    if isinstance(found, tuple):
        return [tensor for part in found for tensor in _tensors(part)]
    return [found] if isinstance(found, torch.Tensor) else []


def _numbers(like: torch.Tensor, size: int, rows: int = _ROWS) -> torch.Tensor:
    """Return random rows, each of another magnitude; with a generator of their own, so that training's numbers stay."""
    generator = torch.Generator(like.device).manual_seed(size)
    numbers = torch.randn(rows, size, generator=generator, device=like.device)
    magnitudes = torch.logspace(-2, 1, rows, device=like.device)[:, None]
    return (numbers * magnitudes).to(torch.float32 if like.dtype == E4M3 else like.dtype)


def _columns(like: torch.Tensor) -> torch.Tensor:
    return 2.0 ** (torch.arange(like.shape[1], device=like.device) % 5 - 2.0)
