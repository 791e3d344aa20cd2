"""From the command line of scripts/compare_strategies.py to the runs it asks for."""

from __future__ import annotations

import argparse

import torch

from qwen_vl_sft.config.command_line import recipe_values, split_words
from qwen_vl_sft.config.reading import read_file
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools.benchmarks.arguments import make_output_dir, random_model_of
from qwen_vl_sft.tools.benchmarks.strategies import Case, Experiment, grid, recipe_of, write_recipes

STEPS = 20


def plan_experiment(arguments: argparse.Namespace, words: list[str]) -> tuple[Experiment, list[Case]]:
    """Check the request, make the random model if one is asked for, and write a recipe a mode. Raises `UserError`."""
    cases = list(grid(_listed(arguments.strategies), _counts(arguments.processes), _listed(arguments.modes)))
    keys = recipe_values(split_words(words))
    keys = {"max_steps": STEPS, **keys}
    steps = keys["max_steps"]
    if not isinstance(steps, int) or not 0 <= arguments.warmup < steps:
        raise UserError(f"--warmup {arguments.warmup} leaves nothing of --max_steps {steps}; give more steps")
    if arguments.kill and steps < 2:
        raise UserError(f"--kill needs a checkpoint in the middle; --max_steps {steps} has none, give more steps")
    written = read_file(arguments.recipe)
    make_output_dir(arguments.output_dir)
    if arguments.config:
        keys["model_name_or_path"] = str(random_model_of(arguments))
    recipes = {mode: recipe_of(written, mode, keys) for mode in dict.fromkeys(case.mode for case in cases)}
    # Counting asks the driver; no GPU is touched, its memory is the runs'.
    on_cpu = torch.cuda.device_count() == 0 or any(recipe.get("use_cpu") for recipe in recipes.values())
    if on_cpu:
        recipes = {mode: {**recipe, "use_cpu": True} for mode, recipe in recipes.items()}
    experiment = Experiment(
        folder=arguments.output_dir,
        recipes=write_recipes(arguments.output_dir, recipes),
        on_cpu=on_cpu,
        warmup=arguments.warmup,
        timeout=arguments.timeout,
        kill_step=steps // 2 if arguments.kill else None,
        keep_models=arguments.keep_models,
    )
    return experiment, cases


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in _listed(text)]
    except ValueError:
        raise UserError(f"--processes: {text} is no list of whole numbers such as 1,2,4") from None
