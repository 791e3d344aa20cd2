"""Rules of a recipe on the model that need no library: quantization, precision, what trains."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.config.launched import Launched, Rule
from qwen_vl_sft.config.reading import Recipe

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
FP8_KEYS = ("fp8_forward", "fp8_backward")
# Of layers in FP8, and of layers in 16 bits whose gradients are FP8 products.
SHARED_FP8_KEYS = ("fp8_modules", "fp8_kernels")


def _quantization(recipe: Recipe, context: Launched) -> Iterator[str]:
    model = recipe.model
    keys = [key for key in QUANTIZED if getattr(model, key)]
    if len(keys) > 1:
        yield f"{' and '.join(keys)} are both set; keep one"
    quantized = keys[0] if keys else None
    if quantized and not model.use_peft:
        yield f"{quantized} with use_peft: false: quantized weights cannot be trained; set use_peft: true (QLoRA)"
    if model.load_in_8bit and context.strategy in ("zero3", "fsdp2"):
        yield f"load_in_8bit does not run under {context.strategy}: 8-bit weights cannot be sharded; use load_in_4bit, or ddp"


def _fp8(recipe: Recipe, context: Launched) -> Iterator[str]:
    model = recipe.model
    if not model.load_in_fp8:
        return
    if model.load_in_fp8 is True and model.dtype != "bfloat16":
        yield f"load_in_fp8 with dtype: {model.dtype}: products in FP8 give bfloat16; set dtype: bfloat16"
    if model.load_in_fp8 is True and recipe.get("fp16"):
        yield "load_in_fp8 with fp16: products in FP8 give bfloat16; set bf16: true in place of fp16"
    if model.use_dora:
        yield "use_dora with load_in_fp8: DoRA reads the base's weights as numbers; set use_dora: false, or load_in_4bit"
    if context.strategy == "zero3":
        yield "load_in_fp8 does not run under zero3: DeepSpeed cannot split FP8 weights; use fsdp2, zero2 or ddp"


def _fp8_gradients(recipe: Recipe, context: Launched) -> Iterator[str]:
    model = recipe.model
    if not model.fp8_gradients:
        return
    if keys := [key for key in QUANTIZED if getattr(model, key)]:
        yield f"fp8_gradients with {keys[0]}: it is for a base in 16 bits; keep one"
    if not model.use_peft:
        yield "fp8_gradients with use_peft: false: it is for frozen layers; set use_peft: true, or leave it out"
    if model.fp8_gradients is True and model.dtype != "bfloat16":
        yield f"fp8_gradients with dtype: {model.dtype}: products in FP8 give bfloat16; set dtype: bfloat16"


def _without_effect(recipe: Recipe, context: Launched) -> Iterator[str]:
    for name in () if recipe.model.use_peft else LORA_KEYS:
        if recipe.sets(name):
            yield f"{name} is set but use_peft is false, so there is no adapter; remove one of the two"
    for name in () if recipe.model.load_in_fp8 else FP8_KEYS:
        if recipe.sets(name):
            yield f"{name} is set but load_in_fp8 is not, so it has no effect; remove it, or set load_in_fp8: true"
    for name in () if recipe.model.load_in_fp8 or recipe.model.fp8_gradients else SHARED_FP8_KEYS:
        if recipe.sets(name):
            yield (
                f"{name} is set but neither load_in_fp8 nor fp8_gradients is, so it has no effect; remove it, or set one"
            )


def _frozen(recipe: Recipe, context: Launched) -> Iterator[str]:
    if recipe.model.use_peft and recipe.model.freeze_vision_tower:
        yield "freeze_vision_tower is for full fine-tuning: with use_peft the base is frozen, and lora_scope says the rest"


def _precision(recipe: Recipe, context: Launched) -> Iterator[str]:
    if recipe.get("fp16") and recipe.get("bf16"):
        yield "fp16 and bf16 are both true; keep one"
    if recipe.model.dtype == "float16" and not recipe.model.use_peft:
        yield "dtype: float16 with use_peft: false: float16 weights cannot be trained; use bfloat16 or float32"


def _router_loss(recipe: Recipe, context: Launched) -> Iterator[str]:
    if recipe.model.router_aux_loss_coef and recipe.get("fp16"):
        yield "router_aux_loss_coef does not run with fp16, whose loss is scaled from step to step; set bf16: true instead"


def _precision_in_full(recipe: Recipe, context: Launched) -> Iterator[str]:
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


MODEL_RULES: tuple[Rule, ...] = (
    _quantization,
    _fp8,
    _fp8_gradients,
    _frozen,
    _precision,
    _precision_in_full,
    _router_loss,
)
# Keys that another one turns off: a plan may pass over them.
IDLE_RULES: tuple[Rule, ...] = (_without_effect,)
