"""Changes to bitsandbytes."""

from __future__ import annotations

import contextlib

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


def _evaluation_repacks() -> bool:
    """Return whether a forward in evaluation changes the stored bytes of a 4-bit layer that may use the CPU kernel."""
    import torch
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
)
