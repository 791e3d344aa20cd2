"""What stands between the products of an MLP, in PyTorch's own operations: the reference of the kernels, and emulation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_vl_sft.modeling.fp8.linear import transpose as transpose_one
from qwen_vl_sft.modeling.fp8.weights import Quantized, quantize_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, Quantized, torch.Tensor]:
    """Normalise rows [M, K]: return them, their quantized form, and 1 / their root mean square [M]."""
    values = x.float()
    rstd = torch.rsqrt(values.square().mean(1, keepdim=True) + epsilon)
    y = weight * (values * rstd).to(weight.dtype)
    return y, quantize_rows(y), rstd[:, 0]


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the rows that `rms_norm` took."""
    normed, own = x.float() * rstd[:, None], grad.float() * weight.float()
    return (rstd[:, None] * (own - normed * (own * normed).mean(1, keepdim=True))).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, kept: torch.Tensor | None = None) -> Quantized:
    """Return silu(gate) * up of rows [M, I], quantized; written to `kept` as well, from which it is then quantized."""
    found = gate.float() * torch.sigmoid(gate.float()) * up.float()
    if kept is not None:
        found = kept.copy_(found)
    return quantize_rows(found)


def swiglu_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up [M, I] from that of silu(gate) * up, in their type."""
    of_gate, of_up = _swiglu_gradients(grad, gate, up)
    return of_gate.to(gate.dtype), of_up.to(up.dtype)


def swiglu_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_columns: torch.Tensor,
    up_columns: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    activated: torch.Tensor | None = None,
) -> Quantized:
    """Return the gradients of gate and up side by side [M, 2 I], each column times its number, quantized.

    Without these numbers they are written to the two tensors `kept` [M, I] as well, and silu(gate) * up to `activated`.
    """
    if activated is not None:
        activated.copy_(gate.float() * torch.sigmoid(gate.float()) * up.float())
    both = _swiglu_gradients(grad, gate, up)
    for target, found in zip(kept or (), both, strict=False):
        target.copy_(found)
    return quantize_rows(torch.cat(both, 1), torch.cat([gate_columns, up_columns]))


def quantize_together(parts: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> Quantized:
    """Quantize rows [M, N] side by side [M, sum of N], each column times its number: all of one scale a row."""
    return quantize_rows(torch.cat(list(parts), 1), torch.cat(list(columns)))


def transpose(*parts: torch.Tensor) -> torch.Tensor:
    """Return the transposes of e4m3 weights [N, K] side by side, [K, sum of N], contiguous."""
    return transpose_one(torch.cat([part.view(torch.uint8) for part in parts]))


def _swiglu_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    d, g, u = grad.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(g)
    return d * u * (sigmoid + g * sigmoid * (1 - sigmoid)), d * (g * sigmoid)
