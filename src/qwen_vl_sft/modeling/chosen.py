"""What the keys of a recipe that may say "auto" come to on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.launch import DistributedContext
from qwen_vl_sft.modeling.attention_kernels import resolve_attention
from qwen_vl_sft.modeling.kernels import chosen_kernels


@dataclass(frozen=True)
class Chosen:
    """The attention implementation, that of packed rows where rows are packed, and the fused kernels."""

    attention: str
    fused_kernels: list[str]


def choose(recipe: Recipe, context: DistributedContext) -> Chosen:
    """The same on all processes of a run. Raises `UserError` for an attention that cannot be used here."""
    model = recipe.model
    attention = resolve_attention(model.attn_implementation, context.on_cpu, model.dtype, recipe.run.packing)
    return Chosen(attention, chosen_kernels(model.fused_kernels, context.on_cpu))
