"""The families that this package trains, found by a model's configuration."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from qwen_vl_sft.families.base import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (qwen2_vl.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(config: Any, source: str = "the model") -> ModelFamily:
    """Return the family of a model's configuration.

    Raises `UserError` for another model, which the message calls `source`.
    """
    family = _BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise UserError(f"{source} is a {config.model_type} model; this package trains {known}")
    return family
