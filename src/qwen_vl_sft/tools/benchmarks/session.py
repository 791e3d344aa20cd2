"""One run of scripts/benchmark.py: the model, the variants, their rounds, the table."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from qwen_vl_sft.checkpointing.run_folder import environment
from qwen_vl_sft.config.command_line import recipe_values, split_words
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools.benchmarks import rounds
from qwen_vl_sft.tools.benchmarks.arguments import TRAINING_ALONE, make_output_dir, random_model_of
from qwen_vl_sft.tools.benchmarks.table import format_table
from qwen_vl_sft.tools.benchmarks.variants import Variant, build, read_names

WARMUP = 3
# A round of fewer rows says more of those rows than of the variant.
FEWEST_ROWS = 96
RARELY = {"logging_steps": 10_000}


def run_session(arguments: argparse.Namespace, recipe_words: list[str]) -> str:
    """Run everything and write the results; returns the table. Raises `UserError`."""
    if arguments.rounds < 1 or arguments.repeat < 1:
        raise UserError("--rounds, --repeat: at least 1")
    names = read_names(arguments.variants)
    keys = recipe_values(split_words(recipe_words))
    make_output_dir(arguments.output_dir)
    model_dir = random_model_of(arguments)
    variants = []
    for name in names:
        own = {"model_name_or_path": str(model_dir), "output_dir": str(arguments.output_dir / "runs" / name)}
        variants.append(build(name, arguments.recipe, {**TRAINING_ALONE, **RARELY, **own, **keys}, arguments.repeat))
        print(f"ready: {name}", flush=True)
    steps = {variant.name: steps_of_a_round(variant, arguments.seconds) for variant in variants}
    measured: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        measured.append(
            {variant.name: rounds.measure(variant, steps[variant.name], WARMUP, number) for variant in variants}
        )
        speeds = ", ".join(f"{name} {one['rows_per_second']:.2f}" for name, one in measured[-1].items())
        print(f"round {number + 1}: {speeds} rows/s", flush=True)
        # After each round: what was measured stays, whatever ends the run.
        results = rounds.summarise(measured, reference=names[0])
        rounds.write_results(arguments.output_dir, results, _about(arguments, keys, steps, measured, variants))
    return format_table(results, rounds.COLUMNS)


def steps_of_a_round(variant: Variant, seconds: float) -> int:
    """How many steps take about so long, and hold rows enough."""
    # A first run compiles and loads kernels, and is far slower.
    rounds.measure(variant, steps=3, warmup=WARMUP)
    speed = rounds.measure(variant, steps=3, warmup=WARMUP)["rows_per_second"]
    return max(3, math.ceil(max(FEWEST_ROWS, seconds * speed) / variant.rows_per_step))


def _about(
    arguments: argparse.Namespace, keys: dict[str, Any], steps: dict[str, int], measured: Any, variants: Any
) -> dict[str, Any]:
    return {
        "config": arguments.config,
        "recipe": str(arguments.recipe),
        "keys": keys,
        "reference": variants[0].name,
        "tokens_per_row": variants[0].tokens_per_row,
        "steps": steps,
        "rounds": measured,
        **about_machine(),
    }


def about_machine() -> dict[str, Any]:
    """What a measurement of this process holds for: versions, commit, GPU."""
    told = environment({}, {}, [torch.cuda.get_device_name()] if torch.cuda.is_available() else ["cpu"])
    return {name: told[name] for name in ("versions", "python", "devices", "git_commit")}
