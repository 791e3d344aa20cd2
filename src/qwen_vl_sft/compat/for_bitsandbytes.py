"""Changes to bitsandbytes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.compat.registry import Patch


def keep_4bit_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place in an evaluation forward on CPUs with AVX512-BF16.

    Training after such a forward fails, and a merge is corrupt.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@cache
def unpack_rows_by_blocks() -> torch.library.Library:
    """Have bitsandbytes unpack 4-bit weights on a CPU with the scales they were packed with, however long their rows are.

    Blocks run through the whole tensor. Its kernel for AVX-512 counts them anew in each row, n // blocksize to a row, so a
    tensor whose rows end inside a block is given to it as one row. Everything that unpacks there goes through this operator:
    `dequantize_4bit`, the products of `Linear4bit` and their gradients. The change lasts as long as what is returned.
    """
    original = _cpu_kernel()

    def unpack(
        keys: Any,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if shape[-1] % blocksize == 0:
            return original.call_boxed(keys, packed, absmax, blocksize, quant_type, shape, dtype)
        row = original.call_boxed(keys, packed, absmax, blocksize, quant_type, [1, prod(shape)], dtype)
        return row.reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        library.impl("dequantize_4bit", unpack, "CPU", with_keyset=True, allow_override=True)
    return library


@cache
def _cpu_kernel() -> Any:
    """Return bitsandbytes' own operator, whatever takes its place later."""
    import bitsandbytes  # noqa: F401  (registers it)

    return torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")


def _counts_blocks_by_rows() -> bool:
    """Return whether rows that end inside a block are unpacked otherwise than the same values in one row."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.linspace(-1, 1, 4 * 96).reshape(4, 96), blocksize=64, quant_type="nf4")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    rows, one = (
        _cpu_kernel().call_boxed(keys, packed, state.absmax, 64, "nf4", shape, torch.float32)
        for shape in ([4, 96], [1, 4 * 96])
    )
    return not torch.equal(rows.reshape(-1), one.reshape(-1))


def _evaluation_repacks() -> bool:
    """Return whether a forward in evaluation changes the stored bytes of a 4-bit layer that may use the CPU kernel."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    layer = layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True
    stored = layer.weight.data.clone()
    with torch.no_grad(), contextlib.suppress(Exception):  # the kernel behind it needs such a CPU
        layer(torch.ones(1, 64, dtype=torch.bfloat16))
    return not torch.equal(layer.weight.data.reshape(-1), stored.reshape(-1))


PATCHES = (
    Patch(
        name="keep_4bit_weights_unpacked",
        package="bitsandbytes",
        broken="<=0.50.2",
        without="On CPUs with AVX512-BF16 an evaluation repacks 4-bit weights: training fails, a merge is corrupt.",
        applied_by="compat.for_bitsandbytes.keep_4bit_weights_unpacked",
        links=("https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078",),
        still_needed=_evaluation_repacks,
        reads={"bitsandbytes.nn.Linear4bit": ("self.support_avx512bf16_for_cpu",)},
    ),
    Patch(
        name="unpack_rows_by_blocks",
        package="bitsandbytes",
        broken="<=0.50.2",
        without="On CPUs with AVX-512 4-bit rows of 4304 values, say, are unpacked with wrong scales: 25% off, not 9%.",
        applied_by="compat.for_bitsandbytes.unpack_rows_by_blocks",
        needs="avx512",
        still_needed=_counts_blocks_by_rows,
        relies_on={"torch.library.get_kernel": ("op", "dispatch_key")},
        reads={
            "torch.library.Library.impl": ("allow_override", "with_keyset"),
            "bitsandbytes.backends.cpu.ops": ('"bitsandbytes::dequantize_4bit", "cpu"',),
        },
    ),
)
