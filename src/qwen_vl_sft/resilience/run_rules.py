"""Rules of a recipe on how long a run may take and what it does when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.launch import DistributedContext
from qwen_vl_sft.resilience.deadline import parse_duration


def _time(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    limit = recipe.run.max_run_time
    if limit is None:
        return
    try:
        seconds = parse_duration(limit)
    except ValueError:
        yield f"max_run_time: {limit!r} is no time; write 3h30m, HH:MM:SS, D-HH:MM:SS or seconds"
        return
    if seconds < 1:
        yield f"max_run_time: {limit} must be above 0"


def _nonfinite(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.run.nonfinite == "skip" and context.zero_stage:
        yield (
            f"nonfinite: skip does not work under {context.strategy}: DeepSpeed changes the weights before the gradient can"
            f" be looked at; set nonfinite: error, or use accelerate_configs/fsdp2.yaml or ddp.yaml"
        )


def _checkpoints(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("save_only_model"):
        yield (
            "save_only_model: true leaves out what a run needs to go on, so that one that is stopped would start anew;"
            " leave it out: the finished model is saved whole in any case, and save_total_limit bounds the disk"
        )
    if recipe.get("save_on_each_node"):
        yield (
            "save_on_each_node: true has every machine write the same files; leave it out, with output_dir on storage that"
            " all machines share"
        )


def _keeps(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("resume_from_checkpoint") and recipe.get("ignore_data_skip"):
        yield "ignore_data_skip with resume_from_checkpoint would train rows twice; leave ignore_data_skip out"


RUN_RULES = (_time, _nonfinite, _checkpoints, _keeps)
