"""Changes to bitsandbytes."""

from __future__ import annotations

from torch import nn


def keep_4bit_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place in an evaluation forward on CPUs with AVX512-BF16.

    Training after such a forward fails, and a merge is corrupt.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
