"""A run in words: its plan, which is printed before training and is all that --dry_run does, and its outcome."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.boxes import BoxCoordinates
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.preview import preview
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import shortened
from qwen_vl_sft.evaluation.metrics import headline_in_log
from qwen_vl_sft.families.base import BoxForm
from qwen_vl_sft.modeling import linear_attention
from qwen_vl_sft.modeling.base_model import format_parameters
from qwen_vl_sft.modeling.fp8.computation import EMULATION
from qwen_vl_sft.modeling.kernels import FROM_LIGER
from qwen_vl_sft.modeling.structure import ModelStructure
from qwen_vl_sft.training.plan_warnings import (
    idle_on_cpu,
    keeps_float32,
    warnings,
    warnings_of_data,
    warnings_of_evaluation,
)
from qwen_vl_sft.training.planned_memory import memory_lines
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run


def show(run: Run, data: PreparedData, dry_run: bool) -> None:
    """Print the plan and its warnings, on the first process; with `dry_run` also the settings and a row."""
    if run.context.rank != 0:
        return
    if dry_run:
        print(run.recipe.to_yaml())
    print(describe(run, data), flush=True)
    idle = idle_on_cpu(run.recipe) if run.context.on_cpu else []
    for warning in (
        *warnings(run.recipe, run.structure.lora_parts),
        *(f"{name}: true has no effect on a CPU" for name in idle),
        *([linear_attention.why_slow()] if _is_slow(run) and not run.context.on_cpu else []),
        *warnings_of_data(run, data),
        *warnings_of_evaluation(data),
    ):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if dry_run:
        print("\n".join(memory_lines(run, data)))
        print(f"\n{preview(data.train, data.encoder)}", flush=True)


def describe(run: Run, data: PreparedData) -> str:
    """Describe a run: world, batch, steps, rows and trainable parameters, at most 80 columns."""
    recipe, context, chosen = run.recipe, run.context, run.chosen
    lines = [
        f"model       {recipe.model.model_name_or_path}",
        f"precision   {_precision(recipe, context.on_cpu)}",
        f"attention   {chosen.attention}{', inside the boundaries of packed rows' * recipe.run.packing}",
        *_kernel_lines(
            recipe.model.fused_kernels, context.on_cpu, chosen.fused_kernels, run.structure.family.unfit_kernels
        ),
        *([f"slow        {run.structure.family.slow}"] if _is_slow(run) else []),
        f"strategy    {context.strategy}, {context.processes} process(es) on {'CPU' if context.on_cpu else 'GPU'}",
        *_batch_lines(run, data.step_plan),
        f"steps       {data.steps}",
        _rows_line("train", data.train),
        *_ignored_lines(data.train),
        *([_rows_line("evaluation", data.evaluation)] if data.evaluation else []),
        *([_answers_line(recipe, data.evaluation)] if data.evaluation and recipe.run.predict_with_generate else []),
        *([data.features.describe()] if data.features else []),
        *boxes_lines(recipe.data.box_coordinates, data.encoder.boxes),
        f"loss on     {'answers and their end-of-turn' if data.encoder.train_on == 'assistant' else 'all text tokens'}",
        f"output      {recipe.output_dir}",
        *([_publishing_line(recipe)] if recipe.run.push_to_hub else []),
        *_trained_lines(recipe.model, run.structure),
    ]
    return "\n".join(lines)


def _is_slow(run: Run) -> bool:
    """Return whether a family's slow part has no kernel in this run."""
    return run.structure.family.slow is not None and linear_attention.NAME not in run.chosen.fused_kernels


def _precision(recipe: Recipe, on_cpu: bool = False) -> str:
    words = recipe.model.precision
    # A CPU has no mixed precision of float16.
    mixed = None if on_cpu and recipe.get("fp16") else recipe.mixed_precision
    fp8 = recipe.model.fp8_gradients
    emulated = ", emulated in float32" * (fp8 == EMULATION)
    gradients = f", gradients of inputs by products in FP8{emulated}" if fp8 else ""
    if words == "float32" and mixed:
        return f"{words}, computed in {mixed}{gradients}"
    return f"{words}{gradients}{', what trains is kept in float32' * keeps_float32(recipe)}"


def _kernel_lines(
    wanted: str | list[str] | None, on_cpu: bool, names: list[str], unfit: Collection[str] = ()
) -> list[str]:
    lines = textwrap.wrap(f"kernels     {', '.join(names)}", width=80, subsequent_indent=" " * 12) if names else []
    fitting = [name for name in FROM_LIGER if name not in unfit]
    missing = [name for name in fitting if name not in names] if wanted == "auto" and not on_cpu else []
    if missing:
        lines.append(f"            with pip install 'qwen_vl_sft[kernels]' also {', '.join(missing)}")
    return lines


def _batch_lines(run: Run, plan: StepPlan | None) -> list[str]:
    recipe, context, global_batch = run.recipe, run.context, run.global_batch
    if plan is None:
        per_device, accumulation = recipe.get("per_device_train_batch_size"), recipe.get("gradient_accumulation_steps")
        shape = f"{per_device} a device x {context.processes} x {accumulation} accumulated"
        return [f"batch       {global_batch} a step = {shape}"]
    found, budget = plan.packing_stats(), recipe.run.tokens_per_batch
    rows = "" if global_batch.rows is not None else f" in about {found.rows:.0f} rows"
    text = (
        f"batch       {global_batch} a step{rows}, packed into {found.micro_batches:.1f} micro-batches a device of at"
        f" most {budget:,} tokens, {found.filled:.0%} full"
    )
    lines = textwrap.wrap(text, width=80, subsequent_indent=" " * 12)
    if recipe.run.share_prefixes:
        lines.append(f"sharing     {found.computed:.0%} of the tokens are computed, the others are shared")
    return lines


def _publishing_line(recipe: Recipe) -> str:
    run = recipe.run
    when = "at the end" if run.hub_strategy == "end" else "with every checkpoint, and at the end"
    where = f"{run.hub_model_id or recipe.output_dir.name}, {run.hub_revision or 'main'}"
    return f"publish     {where}, {'private' if run.hub_private_repo else 'public'}, {when}"


def _trained_lines(settings: ModelSettings, structure: ModelStructure) -> list[str]:
    """Tell what is trained, and the table of its parameters."""
    if not settings.use_peft:
        lines = [f"trains      the model's own weights{', but not the vision tower' * settings.freeze_vision_tower}"]
    else:
        names = sorted({name.rsplit(".", 1)[-1] for name in structure.lora_targets})
        line = f"trains      LoRA r={settings.lora_r} on {len(structure.lora_targets)} layers: {', '.join(names)}"
        lines = textwrap.wrap(line, width=80, subsequent_indent=" " * 12)
    if structure.family.experts:
        lines += _expert_lines(settings, structure)
    if settings.init_adapter:
        lines.append(f"starts from {settings.init_adapter}, with a new optimizer and schedule")
    return [*lines, "", format_parameters(dict(structure.parameters))]


def _expert_lines(settings: ModelSettings, structure: ModelStructure) -> list[str]:
    """Tell what becomes of a mixture's experts and routers, and the memory of all weights, which is computed."""
    trains = "frozen" if settings.use_peft else "trained in full"
    what = "with an adapter each" if structure.adapted_experts else trains
    routers = "trained" if settings.train_router else "frozen"
    held = ", in 4 bits" if settings.load_in_4bit else ", in FP8" if settings.load_in_fp8 else ""
    return [
        f"experts     {what}{held}; routers {routers}",
        f"weights     {structure.base_bytes / 2**30:.1f} GiB as they are loaded (computed)",
    ]


def _rows_line(name: str, part: Scan | Rows) -> str:
    if not isinstance(part, Scan):
        return f"{name:<11} a stream, checked as it comes"
    left_out = [f"{len(part.bad)} bad skipped"] if part.bad else []
    left_out += [f"{len(part.overlong)} over-long dropped"] if part.overlong else []
    mean, longest = part.lengths.tokens.mean(), part.lengths.tokens.max()
    note = f" ({', '.join(left_out)})" if left_out else ""
    return f"{name:<11} {len(part.rows):,} rows{note}, {mean:,.0f} tokens on average, {longest:,} at most"


def _ignored_lines(part: Scan | Rows) -> list[str]:
    columns = (part.rows if isinstance(part, Scan) else part).ignored_columns
    text = f"ignored     {len(columns)} column(s) that are not read: {shortened(', '.join(columns))}"
    return textwrap.wrap(text, width=80, subsequent_indent=" " * 12) if columns else []


def boxes_lines(stated: BoxCoordinates | None, form: BoxForm) -> list[str]:
    """Tell the coordinates of boxes in the data and those that are learned; nothing where the recipe states none."""
    words = {
        "pixels": "pixels of the original image",
        "resized": "pixels of the resized image",
        "norm1": "0 to 1",
        "norm1000": "0 to 1000",
    }
    return [f"boxes       {words[stated]}, learned as {words[form.coordinates]}"] if stated else []


def _answers_line(recipe: Recipe, evaluation: Scan) -> str:
    count = min(recipe.run.max_predict_samples or len(evaluation.rows), len(evaluation.rows))
    return f"answers     {count:,} evaluation rows at every evaluation, {recipe.run.max_new_tokens} tokens at most"


def _loss(value: float) -> str:
    """Write a loss; that of steps that were all left out is none."""
    return f"{value:.4f}" if math.isfinite(value) else "none (not finite)"


def outcome(metrics: dict[str, Any], output_dir: Path) -> str:
    """Describe what a run did, for its last lines."""
    lines = [f"finished    {metrics['steps']} steps, training loss {_loss(metrics['train_loss'])}"]
    if metrics["step_of_weights"] != metrics["steps"]:
        lines.append(f"weights     of step {metrics['step_of_weights']}, the best of the evaluations")
    if "eval_loss" in metrics:
        right = metrics["eval_mean_token_accuracy"]
        lines.append(f"evaluation  loss {_loss(metrics['eval_loss'])}, {right:.1%} of the learned tokens right")
    if answered := headline_in_log(metrics):
        lines.append(f"answers     {answered[0]} {answered[1]:.1%}")
    if "tokens_per_second" in metrics:
        speed = f"speed       {metrics['tokens_per_second']:,.0f} tokens/s, {metrics['images_per_second']:.1f} images/s"
        lines.append(f"{speed}, {metrics['data_wait']:.1%} of the time waiting for data")
    if "experts" in metrics:
        load = metrics["experts"]
        lines.append(
            f"experts     {load['expert_load_min']:.2g} to {load['expert_load_max']:.2g} times an even load,"
            f" {load['idle_experts']} never chosen"
        )
    left_out = metrics["data"]["train"]
    for count, why in (("skipped_bad_rows", "bad rows left out"), ("dropped_overlong_rows", "over-long rows left out")):
        if left_out.get(count):
            lines.append(f"{why:<23} {left_out[count]}")
    for when in ("training", "evaluating"):
        if metrics[f"skipped_while_{when}"]:
            lines.append(f"skipped     {metrics[f'skipped_while_{when}']} rows that could not be read while {when}")
    if metrics["skipped_steps"]:
        lines.append(
            f"skipped     {metrics['skipped_steps']} steps whose loss or gradient was not finite; see skipped_steps.jsonl"
        )
    lines += [f"report_to   {name} failed: {why}" for name, why in metrics["failed_loggers"].items()]
    lines.append(f"written     {output_dir}")
    return "\n".join(lines)
