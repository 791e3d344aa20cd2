"""Rules of a recipe on the model: quantization and precision, what trains, fused kernels, layers that train in full."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

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

LORA_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_scope",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
QUANTIZED = ("load_in_4bit", "load_in_8bit", "load_in_fp8")
FP8_KEYS = ("fp8_modules", "fp8_forward", "fp8_backward", "fp8_kernels")


def _quantization(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    model = recipe.model
    keys = [key for key in QUANTIZED if getattr(model, key)]
    if len(keys) > 1:
        yield f"{' and '.join(keys)} are both set; keep one"
    quantized = keys[0] if keys else None
    if quantized and not model.use_peft:
        yield f"{quantized} with use_peft: false: quantized weights cannot be trained; set use_peft: true (QLoRA)"
    if model.load_in_8bit and context.strategy in ("zero3", "fsdp2"):
        yield f"load_in_8bit does not run under {context.strategy}: 8-bit weights cannot be sharded; use load_in_4bit, or ddp"


def _fp8(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    model = recipe.model
    if not model.load_in_fp8:
        for name in FP8_KEYS:
            if recipe.sets(name):
                yield f"{name} is set but load_in_fp8 is not, so it has no effect; remove it, or set load_in_fp8: true"
        return
    if problem := problem_of_fp8(model, context.on_cpu):
        yield problem
    yield from problems_of_fp8_kernels(model, context.on_cpu)
    if model.load_in_fp8 is True and model.dtype != "bfloat16":
        yield f"load_in_fp8 with dtype: {model.dtype}: products in FP8 give bfloat16; set dtype: bfloat16"
    if model.use_dora:
        yield "use_dora with load_in_fp8: DoRA reads the base's weights as numbers; set use_dora: false, or load_in_4bit"
    if context.strategy == "zero3":
        yield "load_in_fp8 does not run under zero3: DeepSpeed cannot split FP8 weights; use fsdp2, zero2 or ddp"


def _what_trains(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    model = recipe.model
    if not model.use_peft:
        for name in LORA_KEYS:
            if recipe.sets(name):
                yield f"{name} is set but use_peft is false, so there is no adapter; remove one of the two"
    elif model.freeze_vision_tower:
        yield "freeze_vision_tower is for full fine-tuning: with use_peft the base is frozen, and lora_scope says the rest"


def _precision(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("fp16") and recipe.get("bf16"):
        yield "fp16 and bf16 are both true; keep one"
    if recipe.model.dtype == "float16" and not recipe.model.use_peft:
        yield "dtype: float16 with use_peft: false: float16 weights cannot be trained; use bfloat16 or float32"


def _kernels(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    yield from problems_of_kernels(chosen_kernels(recipe.model.fused_kernels, context.on_cpu), context.on_cpu)


def _router_loss(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.model.router_aux_loss_coef and recipe.get("fp16"):
        yield "router_aux_loss_coef does not run with fp16, whose loss is scaled from step to step; set bf16: true instead"


def _precision_in_full(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    """Refuse settings that cannot compute with float32 layers: layers that train in full are float32, others are not."""
    settings, mixed = recipe.model, recipe.mixed_precision
    asked = [name for name in ("lora_modules_to_save", "train_router") if getattr(settings, name)]
    if not settings.use_peft or not asked:
        return
    key = asked[0]
    if settings.dtype != "float32" and not mixed:
        yield (
            f"{key} with dtype: {settings.dtype} needs bf16: true or fp16: true, under which layers in"
            f" float32 and in {settings.dtype} compute together; set one, or dtype: float32"
        )
    elif mixed and context.strategy == "zero3" and not any(getattr(settings, key) for key in QUANTIZED):
        # 4-bit layers cast their inputs.
        yield (
            f"{key} in half precision does not run under zero3: DeepSpeed casts nothing between layers in"
            " float32 and others; launch ddp, zero2 or fsdp2, or set dtype: float32 and bf16: false"
        )


MODEL_RULES = (_quantization, _fp8, _what_trains, _precision, _kernels, _precision_in_full, _router_loss)


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
    for path in (settings.fp8_modules or ()) if settings.load_in_fp8 else ():
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
