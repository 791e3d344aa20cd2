"""One resolved run: recipe and launch, with everything that follows from them before any row is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.batching.global_batch import GlobalBatch, resolve_batch, with_accumulation
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import build_on_meta
from qwen_vl_sft.modeling.chosen import Chosen, choose
from qwen_vl_sft.modeling.model_rules import problems_of_family, problems_of_structure
from qwen_vl_sft.modeling.structure import ModelStructure, build_structure
from qwen_vl_sft.training.rules import problems_of
from qwen_vl_sft.training.second_stage import check_fits, problems_of_init_adapter, with_init_adapter


@dataclass(frozen=True)
class Run:
    """A run as it will be. Nothing changes it later, and nothing of it is worked out again.

    Args:
        recipe: the settings, with the gradient accumulation that the global batch comes to.
        context: how the run was launched.
        global_batch: rows or tokens of an optimizer step over all processes.
        chosen: attention and fused kernels.
        structure: what of the model trains.
    """

    recipe: Recipe
    context: DistributedContext
    global_batch: GlobalBatch
    chosen: Chosen
    structure: ModelStructure

    @property
    def output_dir(self) -> Path:
        """Return the run folder."""
        return self.recipe.output_dir


def resolve(recipe: Recipe, context: DistributedContext) -> Run:
    """Check a recipe as it was launched, and work out the run. Raises one `UserError` with everything that cannot work.

    Nothing but the model's configuration is read, and no other process is waited for.
    """
    try:
        recipe = with_init_adapter(recipe)
    except UserError as error:
        raise UserError(*error.problems, *problems_of(recipe, context)) from None
    problems = [*problems_of(recipe, context), *problems_of_init_adapter(recipe, context)]
    chosen: Chosen | None = None
    try:
        chosen = choose(recipe.model, recipe.run.packing, context.on_cpu)
    except UserError as error:
        problems += error.problems
    model: Any = None
    unbuilt: UserError | None = None
    # Wrong layer names are reported with all other problems; a missing model separately, as finding it may need the network.
    if not problems or (recipe.model.lora_modules_to_save and recipe.model.model_name_or_path):
        try:
            model = build_on_meta(recipe.model)
            problems += problems_of_structure(model, recipe.model)
            family = family_of(model.config)
            problems += problems_of_family(recipe, family)
            chosen = chosen and chosen.fitting(family)
        except UserError as error:
            unbuilt = error
    raise_all(problems)
    if unbuilt is not None:
        raise unbuilt
    assert chosen is not None
    recipe = with_accumulation(recipe, context.processes)
    batch = resolve_batch(recipe, context.processes)
    structure = build_structure(model, recipe.model)
    check_fits(recipe.model, (*structure.lora_targets, *structure.adapted_experts))
    return Run(recipe, context, batch, chosen, structure)
