"""Rules of a recipe on how long a run may take and what it does when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import quoted
from qwen_vl_sft.resilience.deadline import parse_duration


def _time(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    limit = recipe.run.max_run_time
    if limit is None:
        return
    try:
        seconds = parse_duration(limit)
    except ValueError:
        yield f"max_run_time: {quoted(limit)} is not a time; write 3h30m, HH:MM:SS, D-HH:MM:SS or seconds"
        return
    if seconds < 1:
        yield f"max_run_time: {limit} must be above 0"


def _nonfinite(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.run.nonfinite == "skip" and context.zero_stage:
        yield (
            f"nonfinite: skip does not work under {context.strategy}: DeepSpeed changes the weights before the gradient can"
            f" be looked at; set nonfinite: error, or use accelerate_configs/fsdp2.yaml or ddp.yaml"
        )


RUN_RULES = (_time, _nonfinite)
