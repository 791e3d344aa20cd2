"""Rules of a recipe on the model that need its libraries: device and kernels, the family, layers that are named."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

from qwen_vl_sft.config.model_rules import QUANTIZED
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import shortened
from qwen_vl_sft.families.base import ModelFamily, reason_against
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.computation import problem_of_fp8, problems_of_fp8_kernels
from qwen_vl_sft.modeling.fp8.layers import is_fp8, is_inside
from qwen_vl_sft.modeling.kernels import chosen_kernels, problems_of_kernels
from qwen_vl_sft.modeling.lora import EXPERTS, trained_in_full


def _fp8(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.model.load_in_fp8 or recipe.model.fp8_gradients:
        if problem := problem_of_fp8(recipe.model, context.on_cpu):
            yield problem
        yield from problems_of_fp8_kernels(recipe.model, context.on_cpu)


def _kernels(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    yield from problems_of_kernels(chosen_kernels(recipe.model.fused_kernels, context.on_cpu), context.on_cpu)


DEVICE_RULES = (_fp8, _kernels)


def problems_of_family(recipe: Recipe, family: ModelFamily) -> Iterator[str]:
    """Tell what a recipe asks for and a family cannot do, with the family's reason."""
    run, kernels = recipe.run, recipe.model.fused_kernels
    asked = {
        "packing": (run.packing, family.packing, "set packing: false"),
        "share_prefixes": (run.share_prefixes, family.shared_prefixes, "set share_prefixes: false"),
        "enable_thinking": (recipe.data.enable_thinking, family.thinking, "leave enable_thinking out"),
        "cache_image_features": (run.cache_image_features, family.feature_cache, "leave cache_image_features out"),
    }
    for key, (wanted, can, instead) in asked.items():
        if wanted and can is not True:
            yield f"{reason_against(key, family.name, can)}; {instead}"
    if not family.experts:
        for name in ("train_router", "router_aux_loss_coef"):
            if getattr(recipe.model, name):
                yield f"{name} is for mixtures of experts, and {family.name} has no experts; leave it out"
    if family.experts and recipe.model.load_in_8bit:
        # It quantizes linear layers alone.
        yield (
            f"load_in_8bit does not reach the experts of {family.name}, which would stay in {recipe.model.dtype}: most of its"
            " weights; use load_in_4bit or load_in_fp8, which do"
        )
    if recipe.model.lora_scope == EXPERTS:
        yield from _expert_adapter(recipe.model, family)
    for name in kernels if isinstance(kernels, list) else ():
        if name in family.unfit_kernels:
            yield f"fused_kernels: {name} does not fit {family.name}: {family.unfit_kernels[name]}; leave it out"


def _expert_adapter(model: ModelSettings, family: ModelFamily) -> Iterator[str]:
    if not family.experts:
        yield f"lora_scope: experts is for mixtures of experts, and {family.name} has no experts; set lora_scope: language"
    for name in ("lora_dropout", "use_dora"):
        if getattr(model, name):
            yield f"{name} does not work on experts, whose adapters are one parameter for all; leave it out"


def problems_of_structure(model: Any, settings: ModelSettings) -> Iterator[str]:
    """Tell the layers that a recipe names and that cannot be what it asks for, of a base model built on the meta device."""
    yield from _fp8_modules(model, settings)
    yield from _in_full(model, settings)


def _fp8_modules(model: Any, settings: ModelSettings) -> Iterator[str]:
    family = family_of(model.config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in (settings.fp8_modules or ()) if settings.load_in_fp8 or settings.fp8_gradients else ():
        matched = [name for name in names if is_inside(name, path)]
        if not matched:
            yield f"fp8_modules: {shortened(path)} holds no linear layer of the model; name a part such as visual.blocks"
        elif kept := [name for name in matched if family.stays_16bit(name)]:
            yield f"fp8_modules: {kept[0]} stays in 16 bits in {family.name}; leave {shortened(path)} out"


def _in_full(model: Any, settings: ModelSettings) -> Iterator[str]:
    """Tell the entries of `lora_modules_to_save` that cannot train in full.

    PEFT passes over a name that matches nothing; and FSDP2 would train 4-bit values as the numbers they are stored in.
    """
    if not settings.use_peft or not settings.lora_modules_to_save:
        return
    modules = {name: module for name, module in model.named_modules() if name}
    endings = sorted({part for name in modules for part in name.split(".") if not part.isdigit()})
    for wanted in settings.lora_modules_to_save:
        matched = trained_in_full(model, wanted)
        if not matched:
            near = get_close_matches(wanted, endings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its layers are named {', '.join(endings)}"
            yield f"lora_modules_to_save: {shortened(wanted)} matches no layer of the model; {hint}"
        elif lists := [name for name in matched if isinstance(modules[name], nn.ModuleList | nn.ModuleDict)]:
            yield (
                f"lora_modules_to_save: {wanted} is a list of layers ({lists[0]}), which PEFT cannot train as one; name"
                f" what holds it ({lists[0].split('.')[-2]}) or layers in it"
            )
        elif any(getattr(settings, key) for key in QUANTIZED):
            yield from _quantized(settings, wanted, matched, modules, family_of(model.config))


def _quantized(
    settings: ModelSettings, wanted: str, matched: list[str], modules: dict[str, nn.Module], family: ModelFamily
) -> Iterator[str]:
    inside = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and (is_fp8(name, module, family, settings) if settings.load_in_fp8 else not family.stays_16bit(name))
        and any(name == whole or name.startswith(f"{whole}.") for whole in matched)
    ]
    if inside:
        key = next(key for key in QUANTIZED if getattr(settings, key))
        yield (
            f"lora_modules_to_save: {wanted} holds {len(inside)} linear layer(s), such as {inside[0]}, which {key}"
            f" quantizes, and quantized weights cannot be trained in full; reach them with LoRA instead (lora_scope,"
            f" lora_target_modules), name layers without linear ones (norm, embed_tokens), or set {key}: false"
        )
