"""The table of models, methods and cards: what fits on how many GPUs, and how fast it trains."""

from __future__ import annotations

from qwen_vl_sft.config.reading import build
from qwen_vl_sft.families.shape import RELEASED, read_shape
from qwen_vl_sft.planning.cards import CARDS, Card
from qwen_vl_sft.planning.inputs import Launch
from qwen_vl_sft.planning.rows import ASSUMED
from qwen_vl_sft.planning.run import RunPlan

METHODS = {
    "QLoRA": {"load_in_4bit": True},
    "LoRA": {},
    "full": {"use_peft": False},
}
COLUMNS = ("l4", "rtx4090", "l40s", "a100-80", "h100", "h200", "b200")
_COUNTS = (1, 2, 4, 8)
_KEYS = {
    "packing": True,
    "fused_kernels": "auto",
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
            cells = [_cell(model, method, CARDS[name]) for name in COLUMNS]
            name = model.removeprefix("Qwen/").removesuffix("-Instruct")
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(model: str, method: str, card: Card) -> str:
    recipe = build({"model_name_or_path": model, **_KEYS, **METHODS[method]})
    for count in _COUNTS:
        strategies = ["single"] if count == 1 else ["fsdp2"] if method != "full" else ["zero2", "fsdp2"]
        for strategy in strategies:
            plan = RunPlan(recipe, read_shape(RELEASED[model]), ASSUMED, card, Launch(strategy, count))
            if plan.fits:
                rate = plan.rows_per_step / plan.step.seconds
                shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
                return shown if count == 1 else f"{shown} ({count} GPUs)"
    return "-"
