"""A model's structure as it will train, worked out before any weight is loaded: adapted layers and parameter counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import PartCount, count_parameters, freeze_for_full_training
from qwen_vl_sft.modeling.fp8.layers import fp8_layers
from qwen_vl_sft.modeling.lora import (
    expert_parameters,
    find_targets,
    lora_config,
    modules_in_full,
    trained_in_full,
)
from qwen_vl_sft.planning.training_setup import NF4_BYTES, NF4_NESTED_BYTES


@dataclass(frozen=True)
class ModelStructure:
    """What of a model trains.

    Args:
        family: the model's family.
        lora_targets: full names of the layers with LoRA, none without an adapter.
        adapted_experts: full names of the modules whose experts have LoRA each.
        in_full: full names of the modules that train in full beside an adapter.
        parameters: parameters of each part, in all and trainable.
        base_bytes: bytes of the base's weights as they are loaded, those of experts in 4 bits or FP8 too.
    """

    family: ModelFamily
    lora_targets: tuple[str, ...]
    adapted_experts: tuple[str, ...]
    in_full: tuple[str, ...]
    parameters: Mapping[str, PartCount]
    base_bytes: float

    @property
    def adapts_language_only(self) -> bool:
        """Return whether every layer with LoRA is in the language model."""
        return set(self.lora_parts) <= {"language"}

    @property
    def lora_parts(self) -> list[str]:
        """Return the part of the model that each layer with LoRA is in."""
        return [self.family.part_of(name) for name in self.lora_targets]

    @property
    def trained_parts(self) -> set[str]:
        """Return the parts of the model in which something trains."""
        return {part for part, count in self.parameters.items() if count.trainable}


def build_structure(model: Any, settings: ModelSettings) -> ModelStructure:
    """Work out what trains of a base model that was built on the meta device.

    Raises `UserError` for a name in `lora_target_modules` that matches no linear layer.
    """
    family, size = family_of(model.config), base_bytes(model, settings)
    if not settings.use_peft:
        freeze_for_full_training(model, settings)
        return ModelStructure(family, (), (), (), count_parameters(model), size)
    targets = tuple(find_targets(model, settings))
    whole = modules_in_full(settings, family)
    in_full = tuple(name for suffix in whole or () for name in trained_in_full(model, suffix))
    wanted = expert_parameters(settings, family)
    experts = tuple(family.experts.modules(model)) if family.experts and wanted else ()
    return ModelStructure(family, targets, experts, in_full, _count_with_adapter(model, settings, targets), size)


def base_bytes(model: Any, settings: ModelSettings) -> float:
    """Return the bytes of a base model's weights as these settings load them, of a model on the meta device."""
    family, linear = family_of(model.config), nn.Linear
    quantized = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, linear) and not family.stays_16bit(name)
    }
    each = {"float32": 4}.get(settings.dtype, 2)
    narrow = NF4_NESTED_BYTES if settings.use_bnb_nested_quant else NF4_BYTES
    in_fp8 = {f"{name}.weight" for name in fp8_layers(model, settings)} if settings.load_in_fp8 else set()
    total = 0.0
    for name, parameter in model.named_parameters():
        expert, numbers = bool(family.experts and family.experts.is_weight(name)), parameter.numel()
        if settings.load_in_fp8 and (expert or name in in_fp8):
            # A byte each, and the scale of a row.
            total += numbers + 4 * numbers / parameter.shape[-1]
        else:
            total += numbers * (narrow if settings.load_in_4bit and (expert or name in quantized) else each)
    return total


def _count_with_adapter(model: Any, settings: ModelSettings, targets: tuple[str, ...]) -> dict[str, PartCount]:
    """Count the parameters of each part with the adapter on `targets`."""
    if modules_in_full(settings, family_of(model.config)):
        # PEFT copies these layers, and what LoRA puts into them; it takes a second to import.
        from peft import get_peft_model

        return count_parameters(get_peft_model(model, lora_config(model, settings)))
    counts, family = count_parameters(model), family_of(model.config)
    added = dict.fromkeys(counts, 0)
    for name in targets:
        layer = model.get_submodule(name)
        added[family.part_of(name)] += settings.lora_r * (layer.in_features + layer.out_features)
        # DoRA also learns the length of each row of the weight.
        added[family.part_of(name)] += layer.out_features if settings.use_dora else 0
    for name in expert_parameters(settings, family) or ():
        for path, parameter in model.named_parameters():
            if f".{path}".endswith(f".{name}"):
                experts, outputs, inputs = parameter.shape
                added[family.part_of(path)] += experts * settings.lora_r * (inputs + outputs)
    return {part: PartCount(count.total + added[part], added[part]) for part, count in counts.items()}
