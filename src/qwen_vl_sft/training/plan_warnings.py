"""What the plan warns of: settings that have no effect, or another one than may be meant, and faults of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.modeling.lora import covers_all_linear, outside_scope
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run
from qwen_vl_sft.training.shared_rows import count_shared_rows

# Schedules that follow the evaluations, and read nothing else.
_FOLLOW_EVALUATIONS = ("greedy", "reduce_lr_on_plateau")


def warnings(recipe: Recipe, lora_parts: Sequence[str]) -> list[str]:
    """Return what will work but may not be meant."""
    found = []
    if recipe.model.use_peft and recipe.model.lora_target_modules:
        found += outside_scope(lora_parts, recipe.model)
        if covers_all_linear(recipe.model) and "lora_scope" not in recipe.stated:
            found.append(
                f"lora_target_modules: all-linear covers lora_scope {recipe.model.lora_scope}; set lora_scope: all for the"
                f" linear layers of the vision tower and its mergers too, which other trainers may mean by it"
            )
    if recipe.get("eval_strategy") == "no":
        values = recipe.values()
        skipped = [
            name
            for name in ("eval_steps", "max_eval_samples", "eval_on_start", "predict_with_generate")
            if recipe.sets(name) and values[name]
        ]
        found += [f"{name} has no effect: eval_strategy is no, so nothing is evaluated" for name in skipped]
        if "dataset_test_split" in recipe.stated and recipe.data.dataset_test_split:
            found.append(
                f"dataset_test_split {recipe.data.dataset_test_split} is not read: eval_strategy is no; set it to epoch or"
                f" steps to evaluate while training"
            )
    found += _schedule_warnings(recipe)
    if not recipe.run.predict_with_generate and recipe.sets("max_predict_samples"):
        found.append("max_predict_samples has no effect without predict_with_generate: true")
    if not recipe.run.packing and recipe.sets("tokens_per_batch"):
        found.append("tokens_per_batch has no effect without packing: true; per_device_train_batch_size is the batch")
    if recipe.data.dataset_streaming and recipe.get("dataloader_num_workers") > 1:
        found.append("dataloader_num_workers above 1 has no effect: a stream is read by one worker, in its order")
    if not recipe.run.push_to_hub:
        idle = [name for name in sorted(recipe.stated) if name.startswith("hub_") and recipe.sets(name)]
        found += [f"{name} has no effect without push_to_hub: true" for name in idle]
    if _trains_half_precision(recipe) and not keeps_float32(recipe):
        found.append(
            "dtype: bfloat16 without bf16: true loses steps smaller than 0.4% of a weight; bf16: true keeps what trains in"
            " float32"
        )
    if recipe.data.enable_thinking and "max_new_tokens" not in recipe.stated:
        found.append(
            f"enable_thinking with max_new_tokens {recipe.run.max_new_tokens}, the default: most thoughts are longer, and an"
            f" answer whose thought is cut scores as empty; set max_new_tokens"
        )
    if recipe.data.train_on == "all":
        found.append(
            "train_on: all also learns the prompt's fixed text; answers usually come out worse than with assistant"
        )
    return found


def _schedule_warnings(recipe: Recipe) -> list[str]:
    kind, stated = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    if kind not in _FOLLOW_EVALUATIONS:
        return _rising_rates(recipe.get("learning_rate"), stated)
    found = []
    if recipe.get("warmup_steps"):
        found.append(
            f"warmup_steps has no effect: lr_scheduler_type {kind} follows the evaluations and starts at the learning"
            f" rate; leave it out"
        )
    rate, least = recipe.get("learning_rate"), stated.get("min_lr", 1e-3)
    if kind == "greedy" and isinstance(least, (int, float)) and least > rate:
        found.append(
            f"lr_scheduler_type greedy never goes below its min_lr {least:g}, and learning_rate is {rate:g}; set"
            f" lr_scheduler_kwargs: {{min_lr: ...}} below it, and max_lr for the most that it may rise to"
        )
    return found


def _rising_rates(rate: float, stated: dict[str, Any]) -> list[str]:
    """Return a warning for an end of the schedule that lies above the learning rate."""
    ends = [("min_lr", rate), ("min_lr_rate", 1), ("min_lr_ratio", 1)]
    return [
        f"lr_scheduler_kwargs: {name} {stated[name]:g} is above {most:g}, so that the learning rate rises from"
        f" {rate:g}; lower it"
        for name, most in ends
        if isinstance(stated.get(name), (int, float)) and stated[name] > most
    ]


def idle_on_cpu(recipe: Recipe) -> list[str]:
    """Return the keys that are on and that a CPU has nothing for."""
    return [name for name in ("tf32", "fp16", "fp16_full_eval", "activation_offloading") if recipe.training.get(name)]


def warnings_of_data(run: Run, data: PreparedData) -> list[str]:
    """Return what will work but may not be meant, given the rows and the number of steps."""
    recipe, steps, found = run.recipe, data.steps, []
    if isinstance(data.train, Scan):
        rows, tokens = len(data.train.rows), int(data.train.lengths.tokens.sum())
        batch = run.global_batch
        if batch.rows is not None and batch.rows > rows:
            found.append(
                f"a step takes {batch.rows:,} rows and there are {rows:,}, so that an epoch is one step; lower"
                f" global_batch_size (or per_device_train_batch_size x gradient_accumulation_steps)"
            )
        elif batch.tokens is not None and batch.tokens > tokens:
            found.append(
                f"global_batch_tokens {batch.tokens:,} is above the {tokens:,} tokens of all rows, so that an epoch is one"
                f" step; lower it"
            )
    warmup = recipe.get("warmup_steps") or 0
    warmup = math.ceil(warmup * steps) if 0 < warmup < 1 else warmup
    stated = recipe.get("warmup_steps") or 0
    follows = recipe.get("lr_scheduler_type") in _FOLLOW_EVALUATIONS
    if stated >= 1 and stated >= steps and not follows:
        found.append(
            f"warmup_steps {stated:g} is no shorter than the run of {steps:,} steps, so that the learning rate never stays at"
            f" {recipe.get('learning_rate'):g}; lower it, or write a share such as 0.03"
        )
    every = recipe.get("eval_steps") or 0
    if recipe.get("eval_strategy") == "steps" and every > steps:
        found.append(
            f"eval_steps {every:g} is above the run's {steps:,} steps, so that nothing is evaluated while training; lower it,"
            f" or write a share such as 0.1"
        )
    decay = (recipe.get("lr_scheduler_kwargs") or {}).get("num_decay_steps")
    if isinstance(decay, int) and warmup + decay > steps:
        found.append(
            f"lr_scheduler_kwargs: num_decay_steps {decay:,} with a warmup of {warmup:,.0f} steps is longer than the run of"
            f" {steps:,} steps, which ends before the learning rate has decayed; lower it"
        )
    return found


def warnings_of_evaluation(data: PreparedData) -> list[str]:
    """Return a warning when evaluation rows are training rows too."""
    if not isinstance(data.train, Scan) or data.evaluation is None:
        return []
    shared, looked_at = count_shared_rows(data.train, data.evaluation)
    if not shared:
        return []
    return [
        f"{shared} of {looked_at} evaluation rows that were looked at are training rows too, with the same texts and images:"
        f" the evaluation then does not tell how the model does on new rows; evaluate on other rows (dataset_test_split)"
    ]


def _trains_half_precision(recipe: Recipe) -> bool:
    return not recipe.model.use_peft and recipe.model.dtype == "bfloat16"


def keeps_float32(recipe: Recipe) -> bool:
    """Return whether what trains is kept in float32 though the model is in bfloat16."""
    return _trains_half_precision(recipe) and bool(recipe.get("bf16"))
