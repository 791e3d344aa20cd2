"""Rules of a recipe on publishing: names on the Hub, a base that others can load, and when to push."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.publishing.names import problem_of_base, problem_of_branch, problem_of_repo_id


def _publishing(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    run = recipe.run
    if not run.push_to_hub:
        return
    if run.hub_model_id and (problem := problem_of_repo_id(run.hub_model_id)):
        yield f"hub_model_id: {problem}"
    if run.hub_revision and (problem := problem_of_branch(run.hub_revision)):
        yield f"hub_revision: {problem}"
    if problem := problem_of_base(recipe.model.model_name_or_path, recipe.model.use_peft):
        yield problem
    if run.hub_strategy == "every_save" and recipe.get("save_strategy") == "no":
        yield "hub_strategy: every_save publishes checkpoints, and save_strategy is no; set it, or hub_strategy: end"
    if run.hub_strategy == "every_save" and context.strategy == "fsdp2":
        yield "hub_strategy: every_save cannot run under fsdp2: its checkpoints hold no whole weights; set hub_strategy: end"


HUB_RULES = (_publishing,)
