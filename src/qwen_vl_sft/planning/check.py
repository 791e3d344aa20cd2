"""Compare plans with what was measured: a table of memory and of step time for every run of `benchmarks/plan.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_vl_sft.config.reading import build
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.families.shape import Work
from qwen_vl_sft.planning.cards import find_card
from qwen_vl_sft.planning.inputs import Launch, find_shape
from qwen_vl_sft.planning.memory import MARGIN, BatchSizes, keep_as_many, memory_of
from qwen_vl_sft.planning.rows import ASSUMED
from qwen_vl_sft.planning.run import RunPlan
from qwen_vl_sft.planning.speed import step_time

_GIB = 2**30


@dataclass(frozen=True)
class ComparedPlan:
    """A measured run and its plan: GiB on a GPU and seconds a step; no seconds where they were not measured."""

    about: str
    measured_gib: float
    planned_gib: float
    measured_seconds: float | None
    planned_seconds: float

    @property
    def memory_off(self) -> float:
        """Return by what share the plan's memory is too large."""
        return self.planned_gib / self.measured_gib - 1

    @property
    def time_off(self) -> float | None:
        """Return by what share the plan's step is too long."""
        return self.planned_seconds / self.measured_seconds - 1 if self.measured_seconds else None


def compare_all(path: Path) -> list[ComparedPlan]:
    """Compare every run of a file. Raises `UserError` for a file that is none of these."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [_compare(stored, point) for point in stored["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no measured runs: {first_line(error)}") from None


def _compare(stored: Mapping[str, Any], point: Mapping[str, Any]) -> ComparedPlan:
    recipe = build({"model_name_or_path": point["model"], **stored["keys_of_all"], **point["keys"]})
    card = find_card(stored["device"])
    launch = Launch(point["strategy"], point["processes"])
    plan = RunPlan(recipe, find_shape(point["model"]), ASSUMED, card, launch, point["attention"] != "PyTorch")
    training = replace(plan.training, packing=point["last_mlp_spared"])
    training = replace(training, accumulates=point["micro_batches"] > 1)
    batches = [BatchSizes(*sizes) for sizes in point.get("batches") or [point["largest"]]]
    checkpointed = point["checkpointed"]
    if checkpointed == "auto":
        room = card.room * (1 - MARGIN)
        checkpointed = max(keep_as_many(training, batch, room) for batch in batches)
    work = Work(*(value / launch.processes for value in point["step"]))
    planned = step_time(training, card, work, point["micro_batches"], checkpointed).seconds
    rate = point["rows_per_second"]
    return ComparedPlan(
        about=_about(point),
        measured_gib=point["gib"],
        planned_gib=max(memory_of(training, batch, checkpointed).total for batch in batches) / _GIB,
        measured_seconds=point["rows"] / rate if rate else None,
        planned_seconds=planned,
    )


def _about(point: Mapping[str, Any]) -> str:
    model = point["model"].removeprefix("Qwen/").removesuffix("-Instruct")
    launched = f"{point['processes']} x {point['strategy']}" if point["processes"] > 1 else point["strategy"]
    keys = point["keys"]
    method = "full" if keys.get("use_peft") is False else "4-bit" if keys.get("load_in_4bit") else "LoRA"
    kept = "" if not point["checkpointed"] else ", checkpointed" if point["checkpointed"] != "auto" else ", auto"
    checkpointed = "" if "checkpointed" in point["about"] else kept
    return f"{model} {method}, {launched}: {point['about']}{checkpointed}"


def format_table(compared: list[ComparedPlan]) -> str:
    """Return a Markdown table, and how far off the plans are at most and on average."""
    lines = ["| run | GiB | planned | off | s a step | planned | off |", "| --- | --: | --: | --: | --: | --: | --: |"]
    for entry in compared:
        seconds = f"{entry.measured_seconds:.3f}" if entry.measured_seconds else ""
        off = f"{entry.time_off:+.1%}" if entry.time_off is not None else ""
        planned = f"{entry.planned_seconds:.3f}" if entry.measured_seconds else ""
        lines.append(
            f"| {entry.about} | {entry.measured_gib:.1f} | {entry.planned_gib:.1f} | {entry.memory_off:+.1%}"
            f" | {seconds} | {planned} | {off} |"
        )
    memory = [abs(entry.memory_off) for entry in compared]
    times = [abs(entry.time_off) for entry in compared if entry.time_off is not None]
    lines += [
        "",
        f"Memory of {len(memory)} runs: {sum(memory) / len(memory):.1%} off on average, {max(memory):.1%} at most. Step time"
        f" of {len(times)}: {sum(times) / len(times):.1%} and {max(times):.1%}.",
    ]
    return "\n".join(lines)
