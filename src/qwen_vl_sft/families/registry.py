"""The families that this package trains, found by a model's configuration."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe
from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.families.untrained import unknown_model

FAMILIES: tuple[ModelFamily, ...] = (
    qwen2_vl.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
    qwen3_5.FAMILY,
    qwen3_vl_moe.FAMILY,
    qwen3_5_moe.FAMILY,
)
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(config: Any, source: str = "the model") -> ModelFamily:
    """Return the family of a model's configuration.

    Raises `UserError` for another model, which the message calls `source`.
    """
    family = _BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise UserError(unknown_model(source, config.model_type, f"this package trains {known}"))
    return family
