"""A plan in words of at most 80 columns, as JSON, and as a picture."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_vl_sft.planning.advice import Change, changes
from qwen_vl_sft.planning.memory import MARGIN, BatchSizes, memory_of
from qwen_vl_sft.planning.run import RunPlan
from qwen_vl_sft.tiny import builtin_name

GIB = 2**30
WIDTH, _BAR = 80, 34
_GPUS_OF_A_MACHINE = 8
_PARTS = {
    "weights": "weights as stored",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "vision": "vision tower",
    "logits": "output head",
    "caches": "copies of weights",
    "buffers": "communication",
}
ASSUMPTION = (
    "as on the H200s that were measured: the same share of the card's rates, the host as fast; loading, saving and"
    " evaluations not counted"
)


def verdict(plan: RunPlan) -> str:
    """Return one line: whether the plan fits, in how much memory, and how long it takes."""
    need, have = plan.memory.total / GIB, plan.card.room / GIB
    if plan.fits:
        about = "more than" if _slow_attention(plan) else "about"
        return f"fits: {need:.1f} of {have:.1f} GiB, {_checkpointing(plan)}; {about} {hours(plan.hours)}"
    word = "is too tight" if need <= have else "does not fit"
    return f"{word}: {need:.1f} GiB and {MARGIN:.0%} to spare, of {have:.1f} GiB, {_checkpointing(plan)}"


def _slow_attention(plan: RunPlan) -> bool:
    return plan.shape.text.delta is not None and "linear_attention" not in plan.training.kernels


def _checkpointing(plan: RunPlan) -> str:
    count, blocks = plan.checkpointed, plan.training.blocks
    return "no layer checkpointed" if not count else f"{'all' if count == blocks else count} of {blocks} checkpointed"


def hours(value: float) -> str:
    """Return a time as people say it."""
    if value < 1 / 60:
        return f"{value * 3600:.0f} s"
    return f"{value * 60:.0f} min" if value < 1 else f"{value:.1f} h"


def describe(plan: RunPlan) -> str:
    """Return the whole plan, at most 80 columns wide."""
    launch = plan.launch
    where = f"{launch.processes} x {plan.card.name}" if launch.processes > 1 else plan.card.name
    lines = [
        *_wrapped("model", f"{_name(plan)}, {_parameters(plan)}"),
        f"trains      {_trained(plan)}",
        f"launch      {where}, {launch.strategy}",
        *_wrapped("rows", f"{plan.rows.rows:,}, {plan.rows.tokens:,.0f} tokens each; {plan.rows.source}"),
        "",
        *_wrapped("VERDICT", verdict(plan)),
        *_notes(plan),
        "",
        f"memory of a GPU, GiB{'':<9}largest micro-batch: {plan.largest().tokens:,.0f} tokens",
        *_memory_lines(plan),
        "",
        "activations by layers checkpointed, GiB in all",
        *_checkpointing_lines(plan),
        "",
        *_time_lines(plan),
        "",
        *_disk_lines(plan),
    ]
    found = changes(plan)
    if found:
        lines += ["", "to make it faster" if plan.fits else "to make it fit"]
        lines += [line for change in found for line in _change_lines(plan, change)]
    elif not plan.fits:
        lines += ["", "no single change makes it fit: take a larger GPU or more of them"]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(f"{label:<12}{text}", width=WIDTH, subsequent_indent=" " * 12, break_on_hyphens=False)


def _name(plan: RunPlan) -> str:
    name = str(plan.recipe.model.model_name_or_path)
    return builtin_name(name) or name


def _parameters(plan: RunPlan) -> str:
    count = sum(plan.shape.parameters.values())
    return f"{count / 1e9:.2f} billion parameters" if count > 5e7 else f"{count:,} parameters"


def _trained(plan: RunPlan) -> str:
    training = plan.training
    count = f"{training.trained_weights:,} parameters"
    if training.full:
        return f"{count}, the model's own{', but not the vision tower' * training.freeze_vision}"
    base = {4: "4-bit", 8: "8-bit", 16: "16-bit", 32: "float32"}[training.bits]
    return f"{count}: LoRA r={training.rank} on a {'FP8' if training.fp8 else base} base"


def _notes(plan: RunPlan) -> list[str]:
    """Return what is special about the card, and where a row is longer than a micro-batch."""
    notes = []
    if not plan.card.bfloat16 and (plan.recipe.mixed_precision == "bfloat16" or plan.recipe.model.dtype == "bfloat16"):
        notes.append(f"{plan.card.name} has no bfloat16: write dtype: float16, fp16: true and bf16: false")
    if plan.recipe.run.packing and plan.rows.longest > plan.recipe.run.tokens_per_batch:
        notes.append(
            f"a row of {plan.rows.longest:,} tokens is longer than tokens_per_batch, which training refuses: raise it, or"
            " leave such rows out with max_length and overlong: drop"
        )
    if plan.launch.machines > 1 or plan.launch.processes > _GPUS_OF_A_MACHINE:
        notes.append(
            f"{plan.launch.processes} GPUs are taken to be linked as those of one machine; a slower network between"
            " machines makes steps longer"
        )
    if plan.recipe.get("activation_offloading"):
        notes.append("activation_offloading is not counted: activations take less, and steps longer")
    if plan.shape.text.experts:
        notes.append(
            "experts: an even load; their time is that of the experts a token goes through, at a share of the card's rate"
            " that was fitted to one run of 8 layers"
        )
    if _slow_attention(plan):
        notes.append(
            "linear attention runs in PyTorch's operations, which take longer on a GPU than the plan says:"
            " pip install 'qwen_vl_sft[linear]', and fused_kernels: auto"
        )
    return [line for note in notes for line in _wrapped("note", note)]


def _memory_lines(plan: RunPlan) -> list[str]:
    split, have = plan.memory, plan.card.room
    parts = [(label, value) for name, label in _PARTS.items() if (value := getattr(split, name)) >= 0.005 * GIB]
    parts.append((f"margin ({MARGIN:.0%})", have * MARGIN))
    scale = max(split.total + have * MARGIN, have)
    lines = [_bar(label, value, scale) for label, value in parts]
    total = split.total + have * MARGIN
    return [*lines, f"  {'in all':<20}{total / GIB:>8.1f}  of {have / GIB:.1f}"]


def _bar(label: str, value: float, scale: float) -> str:
    return f"  {label:<20}{value / GIB:>8.1f}  {'#' * round(_BAR * value / scale)}"


def _checkpointing_lines(plan: RunPlan) -> list[str]:
    blocks, batch = plan.training.blocks, plan.largest()
    lines = []
    for label, count in (("none", 0), ("half", blocks // 2), ("all", blocks)):
        total = memory_of(plan.training, batch, count).total
        tokens = plan.fitting_tokens(count)
        what = "tokens_per_batch up to" if plan.recipe.run.packing else "tokens of a batch up to"
        fitting = f"{what} {tokens:,}" if tokens else "nothing fits"
        lines.append(f"  {label:<20}{total / GIB:>8.1f}  {fitting}")
    return lines


def _time_lines(plan: RunPlan) -> list[str]:
    step, processes = plan.step, plan.launch.processes
    rate, rows = step.useful_flops / step.seconds / 1e12, plan.rows_per_step / step.seconds
    batches = "1 micro-batch" if plan.micro_batches == 1 else f"{plan.micro_batches} micro-batches"
    gpu_hours = f", {plan.hours * processes:.1f} GPU hours" if processes > 1 else ""
    return [
        f"time        {hours(plan.hours)}{gpu_hours}: {plan.steps:,} steps of {step.seconds:.2f} s",
        f"            {plan.rows_per_step:.0f} rows a step in {batches} a GPU, {rows:.1f} rows/s",
        f"            {plan.tokens / 1e6:,.1f} million tokens, {plan.tokens_per_second:,.0f} tokens/s",
        f"            {plan.flops / 1e15:,.1f} PFLOP, {rate:.0f} useful TFLOP/s a GPU",
        *_wrapped("assumed", ASSUMPTION),
    ]


def _disk_lines(plan: RunPlan) -> list[str]:
    found = plan.disk()
    parts = [f"{_bytes(found['checkpoints'])} of checkpoints ({_bytes(found['checkpoint'])} each)"]
    parts.append(f"{_bytes(found['model'])} finished {'model' if plan.training.full else 'adapter'}")
    if found["features"]:
        parts.append(f"{_bytes(found['features'])} of image features")
    return _wrapped("disk", ", ".join(parts))


def _bytes(value: float) -> str:
    return f"{value / GIB:,.1f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:,.0f} MiB"


def _change_lines(plan: RunPlan, change: Change) -> list[str]:
    less = change.plan.hours / plan.hours - 1
    faster = f", {abs(less):.0%} {'less' if less < 0 else 'more'} time" if abs(less) >= 0.01 else ""
    note = "" if change.same else "; learns something else"
    text = f"{change.text}: {change.plan.memory.total / GIB:.1f} GiB, {hours(change.plan.hours)}{faster}{note}"
    return textwrap.wrap(text, width=WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as values for JSON: bytes, seconds and counts."""
    blocks, batch = plan.training.blocks, plan.largest()
    counts = {"none": 0, "half": blocks // 2, "all": blocks}
    return {
        "model": _name(plan),
        "gpu": asdict(plan.card),
        "strategy": plan.launch.strategy,
        "gpus": plan.launch.processes,
        "verdict": verdict(plan),
        "fits": plan.fits,
        "memory": {**asdict(plan.memory), "margin": plan.card.room * MARGIN, "total": plan.memory.total},
        "room": plan.card.room,
        "checkpointed": plan.checkpointed,
        "layers": blocks,
        "by_checkpointing": {
            name: {
                "memory": memory_of(plan.training, batch, count).total,
                "largest_tokens_per_batch": plan.fitting_tokens(count),
            }
            for name, count in counts.items()
        },
        "largest_micro_batch": asdict(batch),
        "rows": asdict(plan.rows),
        "rows_per_step": plan.rows_per_step,
        "micro_batches": plan.micro_batches,
        "steps": plan.steps,
        "seconds_per_step": plan.step.seconds,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.launch.processes,
        "tokens": plan.tokens,
        "tokens_per_second": plan.tokens_per_second,
        "flops": plan.flops,
        "trained_parameters": plan.training.trained_weights,
        "assumption": ASSUMPTION,
        "disk": plan.disk(),
        "changes": [
            {
                "change": change.text,
                "memory": change.plan.memory.total,
                "hours": change.plan.hours,
                "learns_the_same": change.same,
            }
            for change in changes(plan)
        ],
    }


def plot_memory(plan: RunPlan, path: Path) -> None:
    """Draw memory over `tokens_per_batch` for no, half of and all layers checkpointed, as PNG, SVG or PDF by its name.

    Raises `OSError` and `ValueError` where it cannot be written.
    """
    from matplotlib.figure import Figure

    blocks, batch = plan.training.blocks, plan.largest()
    most = max(4096, min(2 * plan.fitting_tokens(blocks), 8 * int(batch.tokens)))
    sizes = [most * number / 64 for number in range(1, 65)]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, count in (("no layer checkpointed", 0), (f"{blocks // 2} of {blocks}", blocks // 2), ("all", blocks)):
        totals = []
        for size in sizes:
            share = size / batch.tokens
            scaled = BatchSizes(size, batch.target_tokens * share, batch.patches * share)
            totals.append(memory_of(plan.training, scaled, count).total / GIB)
        axes.plot(sizes, totals, label=label)
    axes.axhline(plan.room / GIB, color="black", linestyle="--", label=f"{plan.card.name}, {MARGIN:.0%} to spare")
    axes.axvline(batch.tokens, color="grey", linestyle=":", label="this plan")
    axes.set_xlabel("tokens_per_batch")
    axes.set_ylabel("GiB on a GPU")
    axes.set_xlim(0, most)
    axes.set_ylim(0, 1.6 * plan.card.room / GIB)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
