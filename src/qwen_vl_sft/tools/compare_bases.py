"""Train the same rows with the base in several precisions, and tell how far apart the losses are."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.errors import UserError, quoted, raise_all
from qwen_vl_sft.tools.benchmark import BASES as PRECISIONS
from qwen_vl_sft.tools.measuring import (
    TEXT,
    TRAINING_ALONE,
    contradictions,
    format_table,
    machine_facts,
    make_output_dir,
    random_model_of,
)
from qwen_vl_sft.tools.options import CompareBasesOptions
from qwen_vl_sft.tools.prepared_run import set_up
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

_EMULATION = {**PRECISIONS["bf16"], "load_in_fp8": "emulation"}
# What each base sets in place of the recipe's; more than in benchmarks, which have no use for the speed of an emulation.
BASES: dict[str, Mapping[str, Any]] = {
    **PRECISIONS,
    "float32": {**PRECISIONS["bf16"], "dtype": "float32", "bf16": False},
    "fp8_forward": {**PRECISIONS["fp8"], "fp8_backward": False},
    "fp8_backward": {**PRECISIONS["fp8"], "fp8_forward": False},
    "emulation": _EMULATION,
    "emulation_forward": {**_EMULATION, "fp8_backward": False},
    "emulation_backward": {**_EMULATION, "fp8_forward": False},
    "emulation_gradients": {**PRECISIONS["fp8_gradients"], "fp8_gradients": "emulation"},
}
COLUMNS = {
    "base": ("base", TEXT),
    "seed": ("seed", "{}"),
    "control": ("control", "{}"),
    "steps": ("steps", "{}"),
    "last": ("loss at the end", "{:.4f}"),
    "apart": ("apart at most", "{:+.1%}"),
    "at_step": ("at step", "{}"),
    "apart_on_average": ("on average", "{:+.2%}"),
    "apart_at_the_end": ("at the end", "{:+.1%}"),
}
# Losses are compared as means of so many steps, at every so many.
MEAN_OF, EVERY = 20, 10
COLORS = ("#374151", "#dc2626", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2")
OF_CONTROLS = "#9ca3af"
# A control begins with weights moved by at most this share of themselves, as rounding to bfloat16 moves them.
NUDGE = 2.0**-9


def check_bases(bases: Sequence[str]) -> None:
    """Raise `UserError` for an unknown base, or fewer than two."""
    unknown = [quoted(base) for base in bases if base not in BASES]
    if unknown or len(set(bases)) < 2:
        what = f"{', '.join(unknown)} is unknown" if unknown else "one base has nothing to be compared with"
        raise UserError(f"--bases: {what}; name two or more of {', '.join(BASES)}")


def problems_of(keys: Collection[str], bases: Sequence[str]) -> Iterator[str]:
    """Yield the recipe keys that the comparison sets itself."""
    for key, option in {"seed": "seeds", "max_steps": "steps"}.items():
        if key in keys:
            yield f"--{key}: --{option} sets it; leave it out"
    yield from contradictions(keys, "bases", {base: BASES[base] for base in bases})


def run_session(options: CompareBasesOptions) -> str:
    """Train every base with every seed, write the results after each run; returns the table. Raises `UserError`."""
    check_bases(options.bases)
    keys = recipe_values(options.recipe_keys, options)
    raise_all([*problems_of(keys, options.bases)])
    make_output_dir(options.output_dir)
    own = {"model_name_or_path": str(random_model_of(options))} if options.config else {}
    runs: list[dict[str, Any]] = []
    first, *others = options.bases
    controls = [(first, number) for number in range(1, options.controls + 1)]
    for seed, (base, control) in product(options.seeds, [(first, None), *controls, *((base, None) for base in others)]):
        changed = {**own, **keys, **BASES[base], "seed": seed, "output_dir": str(options.output_dir / "runs")}
        losses = train(options.recipe, changed, options.steps, control)
        runs.append({"base": base, "seed": seed, **({"control": control} if control else {}), "losses": losses})
        results = compare(runs, first)
        name = f"{base}, control {control}" if control else base
        print(f"trained: {name}, seed {seed}: loss {results[-1]['last']:.4f} at the end", flush=True)
        write_results(
            options.output_dir, runs, results, {"keys": keys, "recipe": str(options.recipe), **machine_facts()}
        )
    return format_table(results, COLUMNS)


def train(recipe_file: Path, keys: Mapping[str, Any], steps: int, control: int | None = None) -> list[float]:
    """Train a recipe with other keys; return the loss of each step. Raises `UserError` for one that cannot work.

    The trained weights of a `control` are nudged first, otherwise for each number.
    """
    alone = {**TRAINING_ALONE, "disable_tqdm": False, "max_steps": steps, "logging_steps": 1}
    run, data = set_up(recipe_file, {**alone, **keys})
    trainer: Any = build_trainer(run, sft_config(run), data)
    if control:
        nudge(trainer.model, control)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.end_workers()
    del trainer, run, data
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return losses


def nudge(model: nn.Module, seed: int) -> None:
    """Multiply each trained weight by a number of its own within `NUDGE` of 1: a rounding that is as good as none.

    Two runs that differ in this alone tell how far rounding takes losses apart, whatever the base.
    """
    numbers = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.empty(parameter.shape).uniform_(1 - NUDGE, 1 + NUDGE, generator=numbers)
            parameter.data.mul_(drawn.to(parameter.device))


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return for each step the mean loss of the last `MEAN_OF` steps, of fewer at the beginning."""
    found = []
    for step in range(1, len(losses) + 1):
        last = losses[max(0, step - MEAN_OF) : step]
        found.append(sum(last) / len(last))
    return found


def compare(runs: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Return a row of the table for each run; each is compared with the run of `reference` with the same seed.

    Controls are runs of `reference` too, and compared as those of other bases are.
    """
    of_reference = {run["seed"]: smoothed(run["losses"]) for run in runs if _is_reference(run, reference)}
    results = []
    for run in runs:
        own = smoothed(run["losses"])
        result = {name: run[name] for name in ("base", "seed", "control") if name in run}
        result |= {"steps": len(own), "last": own[-1]}
        if not _is_reference(run, reference):
            pairs = zip(own, of_reference[run["seed"]], strict=True)
            apart = [one / other - 1 for one, other in pairs]
            at_steps = {step: apart[step - 1] for step in range(min(EVERY, len(apart)), len(apart) + 1, EVERY)}
            furthest = max(at_steps, key=lambda step: abs(at_steps[step]))
            result |= {"apart": at_steps[furthest], "at_step": furthest, "apart_at_the_end": apart[-1]}
            result |= {"apart_on_average": sum(at_steps.values()) / len(at_steps)}
            result |= {"apart_at_steps": at_steps}
        results.append(result)
    return results


def _is_reference(run: Mapping[str, Any], reference: str) -> bool:
    return bool(run["base"] == reference and "control" not in run)


def write_results(
    folder: Path, runs: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> None:
    """Write results.json, results.md and loss.png."""
    text = json.dumps({**facts, "mean_of_steps": MEAN_OF, "results": list(results), "runs": list(runs)}, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.md").write_text(format_table(results, COLUMNS) + "\n", encoding="utf-8")
    plot_losses(runs, folder / "loss.png")


def plot_losses(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the smoothed losses of all runs, and below how far they are from those of the first base, in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    bases = list(dict.fromkeys(run["base"] for run in runs))
    of_reference = {run["seed"]: smoothed(run["losses"]) for run in runs if _is_reference(run, bases[0])}
    named: set[str] = set()
    for run in runs:
        own, control = smoothed(run["losses"]), "control" in run
        color = OF_CONTROLS if control else COLORS[bases.index(run["base"]) % len(COLORS)]
        steps = range(1, len(own) + 1)
        name = f"{run['base']}, controls" if control else run["base"]
        upper.plot(steps, own, color=color, linewidth=1.2, label=None if name in named else name)
        named.add(name)
        if not _is_reference(run, bases[0]):
            pairs = zip(own, of_reference[run["seed"]], strict=True)
            lower.plot(steps, [100 * (one / other - 1) for one, other in pairs], color=color, linewidth=1.2)
    upper.legend()
    upper.set_ylabel(f"loss, mean of {MEAN_OF} steps (nats)")
    lower.set_ylabel(f"% above {bases[0]}")
    lower.set_xlabel("optimizer step")
    lower.axhline(0, color="#9ca3af", linewidth=0.8)
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))
