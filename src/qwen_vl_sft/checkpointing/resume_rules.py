"""Rules of a recipe on the run folder: where it may be, what a checkpoint must hold, and what can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.checkpointing.checkpoints import LATEST, with_manifest
from qwen_vl_sft.checkpointing.run_folder import problems_of_output_dir
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext


def _checkpoints(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("save_only_model"):
        yield (
            "save_only_model: true leaves out what a resume needs, so a stopped run would start from the beginning;"
            " leave it out: the finished model is saved whole in any case, and save_total_limit bounds the disk"
        )
    if recipe.get("save_on_each_node"):
        yield (
            "save_on_each_node: true has every machine write the same files; leave it out, with output_dir on storage that"
            " all machines share"
        )


def _resume(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    resume = recipe.get("resume_from_checkpoint")
    if resume and recipe.get("ignore_data_skip"):
        yield "ignore_data_skip with resume_from_checkpoint would train rows twice; leave ignore_data_skip out"
    if not recipe.data.dataset_streaming:
        return
    saved = [folder.name for folder in with_manifest(recipe.output_dir)] if recipe.training.get("output_dir") else []
    # A queued job always passes `latest`, also before there is a checkpoint.
    if resume and (resume != LATEST or saved):
        yield (
            f"dataset_streaming cannot resume from {saved[-1] if resume == LATEST else resume}: its place in the stream"
            f" is not known; start a new run in another output_dir, or set dataset_streaming: false, which can resume"
        )


def _output(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.training.get("output_dir"):
        yield from problems_of_output_dir(
            recipe.output_dir, recipe.run.overwrite_output_dir, recipe.get("resume_from_checkpoint")
        )


RESUME_RULES = (_checkpoints, _resume, _output)
