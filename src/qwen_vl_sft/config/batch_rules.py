"""Rules about the batch of an optimizer step: its rows over all processes, and how packing fills them in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

from qwen_vl_sft.config.launched import Launched, Rule
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.errors import quoted

_TOKENS_SEEN = ("all", "non_padding", "no")


def _batch(recipe: Recipe, context: Launched) -> Iterator[str]:
    whole, per_device = recipe.run.global_batch_size, recipe.get("per_device_train_batch_size")
    if recipe.run.global_batch_tokens is not None:
        if whole is not None:
            yield "global_batch_size and global_batch_tokens both say what an optimizer step takes; remove one of the two"
        if not recipe.run.packing:
            yield "global_batch_tokens needs packing: true; set it, or write global_batch_size"
        if recipe.sets("gradient_accumulation_steps"):
            yield "gradient_accumulation_steps has no effect with global_batch_tokens; remove one of the two"
    if whole is None or per_device < 1:
        return
    per_step = per_device * context.processes
    if recipe.run.packing and whole < context.processes:
        yield f"global_batch_size {whole} is below the {context.processes} processes; raise it, or start fewer"
    elif not recipe.run.packing and whole % per_step:
        yield (
            f"global_batch_size {whole} is not a multiple of per_device_train_batch_size {per_device} x {context.processes}"
            f" process(es) = {per_step}; {_suggest_valid_batch(whole, per_device, context.processes)}"
        )
    elif "gradient_accumulation_steps" in recipe.stated:
        product = per_step * recipe.get("gradient_accumulation_steps")
        if product != whole:
            yield (
                f"global_batch_size {whole} contradicts per_device_train_batch_size {per_device} x {context.processes}"
                f" process(es) x gradient_accumulation_steps {recipe.get('gradient_accumulation_steps')} = {product};"
                f" remove gradient_accumulation_steps"
            )


def _suggest_valid_batch(whole: int, per_device: int, processes: int) -> str:
    """Suggest the nearest valid global batch, and the largest valid batch per device if there is one."""
    per_step = per_device * processes
    ways = [f"global_batch_size {max(1, round(whole / per_step)) * per_step}"]
    if whole % processes == 0:
        share = whole // processes
        ways += [f"per_device_train_batch_size {max(n for n in range(1, per_device + 1) if share % n == 0)}"]
    return f"{' or '.join(ways)} would do"


def _packing(recipe: Recipe, context: Launched) -> Iterator[str]:
    run, model = recipe.run, recipe.model
    if not run.packing:
        if run.share_prefixes:
            yield "share_prefixes needs packing: true; set it, or leave share_prefixes out"
        return
    if run.tokens_per_batch < 1:
        yield f"tokens_per_batch: {run.tokens_per_batch} must be at least 1"
    if recipe.data.dataset_streaming:
        yield "packing needs the lengths of all rows, which a stream does not have; set one of the two to false"
    if recipe.get("neftune_noise_alpha"):
        yield (
            "neftune_noise_alpha with packing: transformers would scale the noise by the tokens of the whole micro-batch"
            " instead of a row's; set packing: false, or leave neftune_noise_alpha out"
        )
    if recipe.get("include_num_input_tokens_seen") not in (False, "no"):
        yield (
            "include_num_input_tokens_seen counts only padded batches; leave it out with packing: metrics.json has the"
            " tokens of the run, and the log their number a second"
        )
    if run.share_prefixes and model.use_peft and model.lora_dropout > 0:
        yield (
            f"share_prefixes with lora_dropout {model.lora_dropout}: all questions on an image would share one draw of"
            f" the dropout in its tokens; set lora_dropout: 0, or share_prefixes: false"
        )
    if run.share_prefixes and recipe.data.train_on == "all":
        yield (
            "share_prefixes with train_on: all: the text of a shared prefix would be learned once, not once a question;"
            " set train_on: assistant, or share_prefixes: false"
        )


def _loader(recipe: Recipe, context: Launched) -> Iterator[str]:
    method, known = recipe.get("dataloader_multiprocessing_context"), multiprocessing.get_all_start_methods()
    if method is None:
        return
    if method not in known:
        yield f"dataloader_multiprocessing_context: {quoted(method)} is unknown; one of {', '.join(known)}"
    elif recipe.get("dataloader_num_workers") == 0:
        yield "dataloader_multiprocessing_context is set but dataloader_num_workers is 0; remove one of the two"


def _tokens_seen(recipe: Recipe, context: Launched) -> Iterator[str]:
    value = recipe.get("include_num_input_tokens_seen")
    if value not in (True, False, *_TOKENS_SEEN):
        yield f"include_num_input_tokens_seen: {quoted(value)} is unknown; one of {', '.join(_TOKENS_SEEN)}"


def _checkpointing(recipe: Recipe, context: Launched) -> Iterator[str]:
    if recipe.run.gradient_checkpointing != "auto":
        return
    if recipe.data.dataset_streaming:
        yield (
            "gradient_checkpointing: auto tries the largest micro-batch first, and a stream does not show which one that is;"
            " set true or false"
        )
    kwargs = recipe.get("gradient_checkpointing_kwargs") or {}
    if kwargs.get("use_reentrant"):
        yield (
            "gradient_checkpointing: auto cannot try gradient_checkpointing_kwargs: use_reentrant: true; set it to false,"
            " or gradient_checkpointing: true"
        )
    if "every_n_layers" in kwargs:
        yield (
            "gradient_checkpointing: auto chooses the layers, and gradient_checkpointing_kwargs: every_n_layers does too;"
            " remove one of the two"
        )


def _image_features(recipe: Recipe, context: Launched) -> Iterator[str]:
    run, model = recipe.run, recipe.model
    if run.cache_image_features is None:
        if run.image_features_dir is not None:
            yield "image_features_dir is set but cache_image_features is not; set it to bfloat16 or int8 as well"
        return
    if not run.packing:
        yield "cache_image_features needs packing: true; set it, or leave cache_image_features out"
    if not model.use_peft:
        yield (
            "cache_image_features needs a vision tower and merger that do not change, and use_peft: false trains the"
            " merger at least; set use_peft: true with lora_scope: language, or leave cache_image_features out"
        )


BATCH_RULES: tuple[Rule, ...] = (_batch, _packing, _loader, _tokens_seen, _checkpointing, _image_features)
