"""The table of models, methods and cards: what fits on how many GPUs, and how fast it trains."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.config.reading import build
from qwen_vl_sft.families.released import RELEASED
from qwen_vl_sft.families.shape_reading import read_shape
from qwen_vl_sft.planning.cards import CARDS, Card
from qwen_vl_sft.planning.inputs import Launch
from qwen_vl_sft.planning.rows import assumed_sizes
from qwen_vl_sft.planning.run import KERNELS_OF_AUTO, RunPlan

METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"load_in_4bit": True},
    "QLoRA, experts too": {"load_in_4bit": True, "lora_scope": "experts"},
    "LoRA": {},
    "LoRA, FP8 base": {"load_in_fp8": True},
    "full": {"use_peft": False},
}
COLUMNS = ("l4", "rtx4090", "l40s", "a100-80", "h100", "h200", "b200")
_COUNTS = (1, 2, 4, 8)
_KEYS = {
    "packing": True,
    "fused_kernels": list(KERNELS_OF_AUTO),
    "gradient_checkpointing": "auto",
    "tokens_per_batch": 8192,
    "global_batch_size": 64,
    "bf16": True,
}


def plan_table() -> str:
    """Return the table in Markdown: rows a second, and the number of GPUs where one is not enough."""
    head = ["model", "method", *(CARDS[name].name for name in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' --: |' * len(COLUMNS)}"]
    for model in RELEASED:
        for method in METHODS:
            sparse = read_shape(RELEASED[model]).text.experts is not None
            if method == ("LoRA, FP8 base" if sparse else "QLoRA, experts too"):
                continue
            cells = [_cell(model, method, CARDS[name]) for name in COLUMNS]
            name = model.removeprefix("Qwen/").removesuffix("-Instruct")
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(model: str, method: str, card: Card) -> str:
    recipe = build({"model_name_or_path": model, **_KEYS, **METHODS[method]})
    if recipe.model.load_in_fp8 and not card.fp8:
        return "no FP8"
    for count in _COUNTS:
        strategies = ["single"] if count == 1 else ["fsdp2"] if method != "full" else ["zero2", "fsdp2"]
        for strategy in strategies:
            shape = read_shape(RELEASED[model])
            plan = RunPlan(recipe, shape, assumed_sizes(shape.vision), card, Launch(strategy, count))
            if plan.fits:
                rate = plan.rows_per_step / plan.step.seconds
                shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
                return shown if count == 1 else f"{shown} ({count} GPUs)"
    return "-"
