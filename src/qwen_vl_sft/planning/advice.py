"""The changes of a plan that would make it fit, or make it faster, the best three first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_vl_sft.planning.inputs import Launch
from qwen_vl_sft.planning.run import RunPlan, idle_keys, refusals

MOST = 3
# Less than this share of the time is not worth a change.
_WORTH = 0.03


@dataclass(frozen=True)
class Change:
    """A change, in words of the recipe or the command line; the plan with it; and whether the same is still learned."""

    text: str
    plan: RunPlan
    same: bool = True


def changes(plan: RunPlan) -> list[Change]:
    """Return at most three changes: those that make a plan fit that does not, else those that save most time.

    Those with fewer GPUs come first, then those that learn the same, then the fastest.
    """
    refused = _refused(plan)
    proposed = _faster(plan) if plan.fits else _smaller(plan)
    found = [change for change in proposed if change.plan.fits and not _refused(change.plan) - refused]
    return sorted((change for change in found if not plan.fits or _gain(plan, change) > _WORTH), key=_cost)[:MOST]


def _refused(plan: RunPlan) -> set[str]:
    return {*refusals(plan), *idle_keys(plan)}


def _cost(change: Change) -> tuple[int, bool, float]:
    return change.plan.launch.processes, not change.same, change.plan.hours


def _gain(plan: RunPlan, change: Change) -> float:
    return 1 - change.plan.hours / plan.hours


def _faster(plan: RunPlan) -> Iterator[Change]:
    model, run = plan.recipe.model, plan.recipe.run
    if not run.packing:
        yield _packed(plan)
    if run.packing and not run.share_prefixes and plan.changed(share_prefixes=True).computed_share < 0.95:
        if model.use_peft and model.lora_dropout:
            # One draw of the dropout would hold for all questions on an image, so the two are refused together.
            without = plan.changed(share_prefixes=True, lora_dropout=0.0)
            yield Change("share_prefixes: true, lora_dropout: 0", without, same=False)
        else:
            yield Change("share_prefixes: true", plan.changed(share_prefixes=True))
    if run.gradient_checkpointing is True and plan.launch.strategy != "zero3":
        yield Change("gradient_checkpointing: auto", plan.changed(gradient_checkpointing="auto"))
    if model.fused_kernels is None:
        yield Change("fused_kernels: auto", plan.changed(fused_kernels="auto"))
    if run.packing:
        fitting = plan.fitting_tokens(0)
        whole = int(plan.rows_per_step * plan.rows.tokens * plan.computed_share / plan.launch.processes * 1.1)
        larger = min(fitting, -(-whole // 1024) * 1024)
        smaller = plan.checkpointed and plan.rows.longest <= larger
        if larger > run.tokens_per_batch or (smaller and run.gradient_checkpointing == "auto"):
            yield Change(f"tokens_per_batch: {larger}", plan.changed(tokens_per_batch=larger))
    frozen = plan.training.trained_parts <= {"language"}
    if run.packing and frozen and not run.cache_image_features and plan.recipe.get("num_train_epochs") > 1:
        yield Change("cache_image_features: bfloat16", plan.changed(cache_image_features="bfloat16"))
    dense = plan.shape.text.experts is None
    if model.use_peft and dense and plan.card.fp8 and not model.load_in_fp8 and not model.use_dora:
        others = ("load_in_4bit", "load_in_8bit", "fp8_gradients")
        in_fp8 = plan.changed(load_in_4bit=False, load_in_8bit=False, fp8_gradients=False, load_in_fp8=True)
        instead = "".join(f", {key}: false" for key in others if getattr(model, key))
        yield Change(f"load_in_fp8: true{instead}", in_fp8, same=False)
        if not instead:
            yield Change("fp8_gradients: true", plan.changed(fp8_gradients=True), same=False)
    if model.load_in_4bit or model.load_in_8bit:
        yield Change(
            "load_in_4bit: false" if model.load_in_4bit else "load_in_8bit: false",
            plan.changed(load_in_4bit=False, load_in_8bit=False),
        )
    elif model.use_peft and plan.checkpointed:
        in_4bit, text = _in_4bit(plan)
        yield Change(text, plan.changed(**in_4bit), same=False)
    if plan.launch.strategy in ("zero3", "fsdp2") and plan.launch.processes > 1:
        yield Change("accelerate_configs/ddp.yaml", plan.changed(launch=_launched(plan, "ddp")))
    yield from _fewer_pixels(plan)


def _smaller(plan: RunPlan) -> Iterator[Change]:
    model, run = plan.recipe.model, plan.recipe.run
    if run.gradient_checkpointing is False:
        yield Change("gradient_checkpointing: auto", plan.changed(gradient_checkpointing="auto"))
    if model.fused_kernels is None:
        yield Change("fused_kernels: auto", plan.changed(fused_kernels="auto"))
    if not run.packing:
        yield from _smaller_batches(plan)
        yield _packed(plan)
    for text, keys in _checkpointing(plan):
        lower = plan.changed(**keys).fitting_tokens(plan.training.blocks if "auto" in str(keys) or _always(plan) else 0)
        if run.packing and plan.rows.longest <= lower < run.tokens_per_batch:
            yield Change(f"{text}tokens_per_batch: {lower}", plan.changed(tokens_per_batch=lower, **keys))
    if not model.use_peft and plan.launch.processes > 1:
        yield from _sharded(plan, ("zero1", "zero2", "fsdp2"))
    elif plan.launch.processes > 1 and not model.load_in_8bit:
        yield from _sharded(plan, ("fsdp2",))
    yield from _more_gpus(plan)
    if model.use_peft and not model.load_in_4bit:
        in_4bit, text = _in_4bit(plan)
        yield Change(text, plan.changed(**in_4bit), same=False)
        if run.gradient_checkpointing is False:
            changed = plan.changed(**in_4bit, gradient_checkpointing="auto")
            yield Change(f"{text}, gradient_checkpointing: auto", changed, same=False)
    if not model.use_peft:
        if not model.freeze_vision_tower:
            yield Change("freeze_vision_tower: true", plan.changed(freeze_vision_tower=True), same=False)
        yield Change("optim: adamw_bnb_8bit", plan.changed(optim="adamw_bnb_8bit"), same=False)
        with_lora: dict[str, Any] = {"use_peft": True, "freeze_vision_tower": False}
        thawed = ", freeze_vision_tower: false" if model.freeze_vision_tower else ""
        yield Change(f"use_peft: true{thawed} (LoRA)", plan.changed(**with_lora), same=False)
        auto, text = _checkpointed_as_needed(plan)
        changed = plan.changed(**with_lora, load_in_4bit=True, **auto)
        yield Change(f"use_peft: true, load_in_4bit: true{thawed}{text} (QLoRA)", changed, same=False)
    yield from _fewer_pixels(plan)


def _more_gpus(plan: RunPlan) -> Iterator[Change]:
    """Yield the fewest GPUs that are enough, for each strategy that shards what takes most."""
    if plan.recipe.model.load_in_8bit:
        return
    for strategy in ("fsdp2",) if plan.recipe.model.use_peft else ("zero2", "fsdp2"):
        for count in (2, 4, 8, 16, 32, 64):
            changed = plan.changed(launch=Launch(strategy, count))
            if count > plan.launch.processes and changed.fits:
                yield Change(f"{count} GPUs with accelerate_configs/{strategy}.yaml", changed)
                break


def _checkpointing(plan: RunPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", {}
    if plan.recipe.run.gradient_checkpointing is False:
        yield "gradient_checkpointing: auto, ", {"gradient_checkpointing": "auto"}


def _packed(plan: RunPlan) -> Change:
    auto, text = _checkpointed_as_needed(plan)
    return Change(f"packing: true{text}", plan.changed(packing=True, **auto))


def _in_4bit(plan: RunPlan) -> tuple[dict[str, Any], str]:
    """Return the keys of a base in 4 bits in place of 8, and their text."""
    others = ("load_in_8bit", "load_in_fp8", "fp8_gradients")
    text = "".join(f", {key}: false" for key in others if getattr(plan.recipe.model, key))
    return {"load_in_4bit": True, **dict.fromkeys(others, False)}, f"load_in_4bit: true{text}"


def _checkpointed_as_needed(plan: RunPlan) -> tuple[dict[str, Any], str]:
    """Return the keys that checkpoint only as many layers as memory requires, and their text; nothing where it is so."""
    if plan.recipe.run.gradient_checkpointing == "auto":
        return {}, ""
    return {"gradient_checkpointing": "auto"}, ", gradient_checkpointing: auto"


def _always(plan: RunPlan) -> bool:
    return plan.recipe.run.gradient_checkpointing is not False


def _smaller_batches(plan: RunPlan) -> Iterator[Change]:
    """Yield the largest batch of a GPU that fits, by halves, with the same rows a step."""
    rows, accumulated = (plan.recipe.get(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    fewer = rows // 2
    while fewer and rows % fewer == 0:
        steps = accumulated * rows // fewer
        changed = plan.changed(per_device_train_batch_size=fewer, gradient_accumulation_steps=steps)
        if changed.fits:
            # A global batch says itself how many are accumulated.
            more = "" if plan.recipe.run.global_batch_size else f", gradient_accumulation_steps: {steps}"
            yield Change(f"per_device_train_batch_size: {fewer}{more}", changed)
            return
        fewer //= 2


def _sharded(plan: RunPlan, strategies: tuple[str, ...]) -> Iterator[Change]:
    for strategy in strategies:
        if strategy != plan.launch.strategy:
            yield Change(f"accelerate_configs/{strategy}.yaml", plan.changed(launch=_launched(plan, strategy)))


def _launched(plan: RunPlan, strategy: str) -> Launch:
    return Launch(strategy, plan.launch.processes, plan.launch.machines)


def _fewer_pixels(plan: RunPlan) -> Iterator[Change]:
    """Yield half of the pixels an image has on average."""
    rows, side = plan.rows, plan.shape.vision.patch
    if rows.images and rows.patches / rows.images > 400:
        pixels = rows.patches / rows.images * side * side
        limit = max(1, int(pixels / 2) // 1000) * 1000
        changed = plan.changed(rows=rows.with_pixels(limit / pixels), max_pixels=limit)
        yield Change(f"max_pixels: {limit} (half of an image's on average)", changed, same=False)
