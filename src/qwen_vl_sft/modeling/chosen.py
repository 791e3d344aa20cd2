"""Resolve the keys that a recipe may set to "auto" on this machine: attention and fused kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.modeling.attention_kernels import resolve_attention
from qwen_vl_sft.modeling.kernels import chosen_kernels


@dataclass(frozen=True)
class Chosen:
    """The attention implementation, that of packed rows where rows are packed, and the fused kernels."""

    attention: str
    fused_kernels: list[str]

    def fitting(self, family: ModelFamily) -> Chosen:
        """Return the same without the kernels that do not fit a family, of which "auto" knows nothing."""
        return replace(self, fused_kernels=[name for name in self.fused_kernels if name not in family.unfit_kernels])


def choose(settings: ModelSettings, packing: bool, on_cpu: bool) -> Chosen:
    """Choose attention and kernels, the same on all processes. Raises `UserError` for an attention that cannot be used."""
    attention = resolve_attention(settings.attn_implementation, on_cpu, settings.dtype, packing)
    return Chosen(attention, chosen_kernels(settings.fused_kernels, on_cpu))
