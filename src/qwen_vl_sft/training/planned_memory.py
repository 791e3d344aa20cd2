"""The memory that a resolved run is planned to need: for the dry run, and for the first trial of checkpointing."""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.shape_reading import read_shape
from qwen_vl_sft.modeling.attention_kernels import SDPA
from qwen_vl_sft.modeling.base_model import load_config
from qwen_vl_sft.planning.cards import Card, card_of_device
from qwen_vl_sft.planning.inputs import Launch
from qwen_vl_sft.planning.memory import memory_of
from qwen_vl_sft.planning.report import verdict
from qwen_vl_sft.planning.rows import measured_sizes
from qwen_vl_sft.planning.run import RunPlan
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run

_GIB = 2**30


def planned_run(run: Run, data: PreparedData, card: Card) -> RunPlan | None:
    """Return the plan of a run on a card; None for a stream, and for a model that plans do not know."""
    if not isinstance(data.train, Scan):
        return None
    try:
        shape = read_shape(load_config(run.recipe.model).to_dict())
    except UserError:
        return None
    rows = measured_sizes(data.train.lengths, data.train.content_hashes)
    launch = Launch(run.context.strategy, run.context.processes)
    flash = run.chosen.attention not in (SDPA, "flash_attention_2")
    return RunPlan(run.recipe, shape, rows, card, launch, flash)


def memory_lines(run: Run, data: PreparedData) -> list[str]:
    """Return the lines of a dry run about memory: the verdict for this GPU, or on a CPU what a GPU would need."""
    if run.context.on_cpu:
        plan = planned_run(run, data, _ANY)
        return [] if plan is None else [f"memory      {_needed(plan)}", "            scripts/plan.py tells of a GPU"]
    properties = torch.cuda.get_device_properties(run.context.local_rank)
    known = card_of_device(properties.name, properties.total_memory)
    plan = planned_run(run, data, _of_device(properties, known))
    if plan is None:
        return []
    return [f"memory      planned: {verdict(plan) if known else _needed(plan)}"]


def expected_bytes(run: Run, data: PreparedData) -> Any:
    """Return what tells the bytes planned for so many checkpointed layers; None where there is no plan."""
    plan = planned_run(run, data, _ANY)
    if plan is None:
        return None
    largest = plan.largest()
    return lambda checkpointed: memory_of(plan.training, largest, checkpointed).total


# Where rates and room are not asked for.
_ANY = Card("a GPU", 80 * _GIB, 1e15, 3e12)


def _of_device(properties: Any, known: Card | None) -> Card:
    rates = known or _ANY
    return Card(properties.name, properties.total_memory, rates.flops, rates.bandwidth, rates.link)


def _needed(plan: RunPlan) -> str:
    none, every = (memory_of(plan.training, plan.largest(), count).total for count in (0, plan.training.blocks))
    return f"about {none / _GIB:.1f} GiB on a GPU with no layer checkpointed, {every / _GIB:.1f} with all"
