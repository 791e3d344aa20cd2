"""Place LoRA: scopes of the model, explicit targets, and a check that every target exists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, shortened
from qwen_vl_sft.families.base import PARTS, ModelFamily
from qwen_vl_sft.families.registry import family_of

if TYPE_CHECKING:
    from peft import LoraConfig

# PEFT's word for every linear layer but the output head; here of the parts that `lora_scope` names.
ALL_LINEAR = "all-linear"
# The scope with an adapter on every expert.
EXPERTS = "experts"


def scope_parts(scope: str) -> tuple[str, ...]:
    """Return the parts of the model that a scope names."""
    return {"all": PARTS, EXPERTS: ("language",)}.get(scope, (scope,))


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that LoRA may wrap: linear ones but the output head, which the fused loss reads raw."""
    head = family_of(model.config).output_head
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]


def covers_all_linear(settings: ModelSettings) -> bool:
    """Return whether LoRA goes into every linear layer of `lora_scope`."""
    return settings.lora_target_modules in (None, [ALL_LINEAR])


def find_targets(model: nn.Module, settings: ModelSettings) -> list[str]:
    """Return the full names of the layers that get LoRA.

    Raises `UserError` for `all-linear` beside other targets, and for one that matches no linear layer, with the names
    there are.
    """
    layers = linear_layers(model)
    if covers_all_linear(settings):
        parts = scope_parts(settings.lora_scope)
        return [name for name in layers if family_of(model.config).part_of(name) in parts]
    assert settings.lora_target_modules is not None
    if ALL_LINEAR in settings.lora_target_modules:
        raise UserError(f"lora_target_modules: {ALL_LINEAR} stands beside other names; keep it alone, or leave it out")
    unmatched = [target for target in settings.lora_target_modules if not _matches(layers, [target])]
    if unmatched:
        known = sorted({name.rsplit(".", 1)[-1] for name in layers} - {str(number) for number in range(10)})
        raise UserError(
            f"lora_target_modules: {shortened(', '.join(unmatched))} match(es) no linear layer of the model;"
            f" its layers are named {', '.join(known)}"
        )
    return _matches(layers, settings.lora_target_modules)


def expert_parameters(settings: ModelSettings, family: ModelFamily) -> list[str] | None:
    """Return the parameters of experts that get LoRA, by how their names end; None for none."""
    return list(family.experts.parameters) if settings.lora_scope == EXPERTS and family.experts else None


def modules_in_full(settings: ModelSettings, family: ModelFamily) -> list[str] | None:
    """Return which modules train in full beside an adapter: those of `lora_modules_to_save`, and routers if asked."""
    routers = [family.experts.router] if settings.train_router and family.experts else []
    return [*(settings.lora_modules_to_save or ()), *routers] or None


def trained_in_full(model: nn.Module, suffix: str) -> list[str]:
    """Return the modules that an entry of `lora_modules_to_save` means: as PEFT matches, by how the whole name ends."""
    return [name for name, _ in model.named_modules() if name and name.endswith(suffix)]


def outside_scope(parts: Iterable[str], settings: ModelSettings) -> list[str]:
    """Return a warning for each part of the model where explicit targets put LoRA although the scope does not name it."""
    counts = {part: 0 for part in PARTS if part not in scope_parts(settings.lora_scope)}
    for part in parts:
        if part in counts:
            counts[part] += 1
    return [
        f"lora_target_modules puts LoRA on {count} layers of the {part} part, outside lora_scope {settings.lora_scope};"
        f" set lora_scope to all if that is meant, or name the layers more fully"
        for part, count in counts.items()
        if count
    ]


def lora_config(model: nn.Module, settings: ModelSettings) -> LoraConfig:
    """Build PEFT's configuration of the adapter, for exactly the layers of `find_targets`."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        target_modules=shortest_targets(model, find_targets(model, settings)),
        target_parameters=expert_parameters(settings, family_of(model.config)),
        modules_to_save=modules_in_full(settings, family_of(model.config)),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def shortest_targets(model: nn.Module, targets: list[str]) -> list[str] | str:
    """Return `targets` as PEFT's suffixes when these hit nothing else, else as one regular expression.

    Suffixes are what other tools that read the adapter, such as vLLM, understand best.
    """
    names = [name for name, _ in model.named_modules()]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in targets})
    if _matches(names, suffixes) == targets:
        return suffixes
    # layers.0.x and layers.1.x become one alternative, layers.\d+.x
    shapes = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in targets})
    pattern = "|".join(shapes)
    if [name for name in names if re.fullmatch(pattern, name)] == targets:
        return pattern
    return targets


def _matches(names: list[str], suffixes: list[str]) -> list[str]:
    """Return the names that end in one of the suffixes, as PEFT matches them."""
    return [name for name in names if any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)]
