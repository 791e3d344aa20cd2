"""Rules of a recipe on single numbers: how small and how large each may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_vl_sft.config.reading import Recipe

_AT_LEAST_ONE = (
    "max_train_samples",
    "max_eval_samples",
    "max_length",
    "min_pixels",
    "max_pixels",
    "dataset_num_proc",
    "max_predict_samples",
    "max_new_tokens",
    "lora_r",
    "lora_alpha",
    "global_batch_size",
    "global_batch_tokens",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "dataloader_prefetch_factor",
    "torch_empty_cache_steps",
    "ddp_bucket_cap_mb",
    "ddp_timeout",
)
_AT_LEAST_ZERO = (
    "dataloader_num_workers",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_epsilon",
    "neftune_noise_alpha",
    "eval_delay",
    "router_aux_loss_coef",
)
_SHARES = ("lora_dropout", "adam_beta1", "adam_beta2")
# Keys that count only while another says "steps".
_INTERVALS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
# NumPy takes no other seeds.
_MOST_SEED = 2**32 - 1


def _ranges(recipe: Recipe, context: object) -> Iterator[str]:
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = _value(recipe, name)
            if value is not None and value < least:
                yield f"{name}: {value} must be at least {least}"
    for name in _SHARES:
        if not 0 <= _value(recipe, name) < 1:
            yield f"{name}: {_value(recipe, name)} must be at least 0 and below 1"
    for name, strategy in _INTERVALS.items():
        value = _value(recipe, name)
        if recipe.get(strategy) == "steps" and value is not None and value <= 0:
            yield f"{name}: {value:g} must be above 0; {strategy}: no is for never"
    for name in ("seed", "data_seed"):
        value = _value(recipe, name)
        if value is not None and not 0 <= value <= _MOST_SEED:
            yield f"{name}: {value} must be at least 0 and at most {_MOST_SEED}"
    if recipe.get("learning_rate") <= 0:
        yield f"learning_rate: {recipe.get('learning_rate')} must be above 0"
    if recipe.get("max_steps") == 0:
        yield "max_steps: 0 would train nothing; leave it out, or write -1, to train for num_train_epochs"
    elif recipe.get("max_steps") < 0 and recipe.get("num_train_epochs") <= 0:
        yield "num_train_epochs must be above 0, or max_steps set"
    if recipe.data.min_pixels and recipe.data.max_pixels and recipe.data.min_pixels > recipe.data.max_pixels:
        yield f"min_pixels {recipe.data.min_pixels:,} is above max_pixels {recipe.data.max_pixels:,}"


def _value(recipe: Recipe, name: str) -> Any:
    ours = recipe.values()
    return ours[name] if name in ours else recipe.get(name)


RANGE_RULES = (_ranges,)
