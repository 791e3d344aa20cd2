"""Rules of a recipe on the layers that train in full beside an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from torch import nn

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.launch import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.base_model import NOT_QUANTIZED, build_on_meta
from qwen_vl_sft.modeling.lora import trained_in_full


def _saved_modules(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    """PEFT passes over a name that matches nothing; and FSDP2 would train 4-bit values as the numbers they are stored in."""
    settings = recipe.model
    if not settings.use_peft or not settings.lora_modules_to_save or not settings.model_name_or_path:
        return
    try:
        model = build_on_meta(settings)
    except UserError:
        return  # told when the model is loaded
    modules = {name: module for name, module in model.named_modules() if name}
    endings = sorted({part for name in modules for part in name.split(".") if not part.isdigit()})
    for wanted in settings.lora_modules_to_save:
        matched = trained_in_full(model, wanted)
        if not matched:
            near = get_close_matches(wanted, endings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its layers are named {', '.join(endings)}"
            yield f"lora_modules_to_save: {wanted} matches no layer of the model; {hint}"
        elif lists := [name for name in matched if isinstance(modules[name], nn.ModuleList | nn.ModuleDict)]:
            yield (
                f"lora_modules_to_save: {wanted} is a list of layers ({lists[0]}), which PEFT cannot train as one; name"
                f" what holds it ({lists[0].split('.')[-2]}) or layers in it"
            )
        elif settings.load_in_4bit or settings.load_in_8bit:
            yield from _quantized(recipe, wanted, matched, modules)


def _quantized(recipe: Recipe, wanted: str, matched: list[str], modules: dict[str, nn.Module]) -> Iterator[str]:
    inside = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and name not in NOT_QUANTIZED
        and any(name == whole or name.startswith(f"{whole}.") for whole in matched)
    ]
    if inside:
        key = "load_in_4bit" if recipe.model.load_in_4bit else "load_in_8bit"
        yield (
            f"lora_modules_to_save: {wanted} holds {len(inside)} linear layer(s), such as {inside[0]}, which {key}"
            f" quantizes, and quantized weights cannot be trained in full; reach them with LoRA instead (lora_scope,"
            f" lora_target_modules), name layers without linear ones (norm, embed_tokens), or set {key}: false"
        )


def _precision_of_saved_modules(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    """They are held in float32, and what passes between them and layers in half precision must be cast."""
    settings, mixed = recipe.model, recipe.mixed_precision
    if not settings.use_peft or not settings.lora_modules_to_save:
        return
    if settings.dtype != "float32" and not mixed:
        yield (
            f"lora_modules_to_save with dtype: {settings.dtype} needs bf16: true or fp16: true, under which layers in"
            f" float32 and in {settings.dtype} compute together; set one, or dtype: float32"
        )
    elif mixed and context.strategy == "zero3" and not (settings.load_in_4bit or settings.load_in_8bit):
        # 4-bit layers cast what comes to them.
        yield (
            "lora_modules_to_save in half precision does not run under zero3: DeepSpeed casts nothing between layers in"
            " float32 and others; launch ddp, zero2 or fsdp2, or set dtype: float32 and bf16: false"
        )


LORA_RULES = (_saved_modules, _precision_of_saved_modules)
