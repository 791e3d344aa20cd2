"""A recipe's run set up in the process of a tool, with its rows; the tool builds a trainer of it, or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.training.prepared_data import PreparedData, prepare_data
from qwen_vl_sft.training.resolve import Run, resolve

# What a base in 16 bits sets in place of the recipe's.
IN_16_BITS: Mapping[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "load_in_fp8": False,
    "fp8_gradients": False,
}


def set_up(recipe_file: Path | None, keys: Mapping[str, Any]) -> tuple[Run, PreparedData]:
    """Return the run of a recipe with other keys, and its rows. Raises `UserError` for a recipe that cannot work."""
    recipe = read_recipe(recipe_file, dict(keys))
    context = read_context(use_cpu=recipe.get("use_cpu"))
    run = resolve(recipe, context)
    launch.start(context)
    return run, prepare_data(run)
