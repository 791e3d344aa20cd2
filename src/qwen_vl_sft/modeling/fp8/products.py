"""Products of FP8 values: on the GPU's tensor cores, or emulated in float32, with the same rounding of all inputs."""

from __future__ import annotations

import torch

from qwen_vl_sft.modeling.fp8.weights import Quantized

# Ada, Hopper and Blackwell have them.
FIRST_CAPABILITY = (8, 9)


def problem_of_device(on_cpu: bool) -> str | None:
    """Return why products in FP8 do not run here; None where they do."""
    if on_cpu:
        return "CPUs have no products in FP8"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name()
        return (
            f"{name} has no products in FP8 (compute capability {capability[0]}.{capability[1]}; Ada has 8.9, Hopper 9.0,"
            f" Blackwell 10.0 and 12.0)"
        )
    return None


def product(
    left: Quantized,
    right: torch.Tensor,
    columns: torch.Tensor | None,
    bias: torch.Tensor | None,
    emulated: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `left` [M, K] times the transpose of `right` [N, K], each column times its number, plus `bias` [N].

    Args:
        left: the quantized input.
        right: e4m3 values, contiguous.
        columns: float32 [N], the scales of the rows of `right`; None for 1.
        bias: in bfloat16 on a GPU.
        emulated: compute in float32, from the same FP8 values.
        out: where the result is put, if it may be anywhere in particular.

    Returns:
        [M, N], bfloat16, and float32 where it is emulated.
    """
    if not emulated:
        if columns is None:
            columns = left.scales.new_ones(len(right))
        # Fast accumulation: the tensor cores add up without promoting to float32 in between.
        return torch._scaled_mm(
            left.values,
            right.t(),
            scale_a=left.scales,
            scale_b=columns[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            **({} if out is None else {"out": out}),
        )
    with torch.autocast(left.values.device.type, enabled=False):
        found = (left.values.float() @ right.float().t()) * left.scales
    if columns is not None:
        found = found * columns
    found = found if bias is None else found + bias.float()
    return found if out is None else out.copy_(found)
