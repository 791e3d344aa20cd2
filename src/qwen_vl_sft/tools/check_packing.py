"""Compare packed rows and shared prefixes with rows one at a time, at a real shape and in the precision of training."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, PackedCollator
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError, quoted, raise_all
from qwen_vl_sft.modeling.linear_attention import padded_in_torch
from qwen_vl_sft.tools.measuring import (
    TEXT,
    TRAINING_ALONE,
    contradictions,
    machine_facts,
    make_output_dir,
    random_model_of,
)
from qwen_vl_sft.tools.options import CheckPackingOptions
from qwen_vl_sft.tools.prepared_run import IN_16_BITS, set_up
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

COLUMNS = {
    "precision": ("precision", TEXT),
    "kernels": ("kernels", TEXT),
    "rows": ("rows", TEXT),
    "loss": ("mean loss", "{:.6f}"),
    "token_loss_mean": ("a token's loss off by", "{:.1e}"),
    "token_loss_largest": ("at most", "{:.1e}"),
    "gradient": ("gradient off by", "{:.1e}"),
}
# What each precision sets. Those that name a base have one of that precision, beside bases in 16 and 32 bits; otherwise
# the recipe says which base all of them have.
_BF16 = {"dtype": "bfloat16", "bf16": True}
PRECISIONS: dict[str, dict[str, Any]] = {"float32": {"dtype": "float32", "bf16": False}, "bfloat16": _BF16}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp8": {"load_in_fp8": True},
    "fp8_forward": {"load_in_fp8": True, "fp8_backward": False},
    "fp8_backward": {"load_in_fp8": True, "fp8_forward": False},
    "emulation": {"load_in_fp8": "emulation"},
    "fp8_gradients": {"fp8_gradients": True},
    "emulation_gradients": {"fp8_gradients": "emulation"},
}
PADDED_ROWS = 4
# LoRA begins at zero, where half of its gradients are.
LORA_B_STD = 0.02
# Computing in another order rounds otherwise; a row that saw its neighbour would be off by far more than all rounding.
TOLERATED = 1.5
ROUNDING = 1e-4  # of float32 kernels that add up in another order

# What the comparison needs: dropout would draw other numbers for each way, and float32 is what all is compared with.
NEEDED: Mapping[str, Any] = {"lora_dropout": 0.0, "tf32": False}

Losses = dict[int, list[float]]


def compare(options: CheckPackingOptions) -> tuple[list[dict[str, Any]], bool]:
    """Compare token losses and adapter gradients of single, padded, packed and shared rows, in each precision.

    Everything is compared with float32, one row at a time, without fused kernels. With `fused_kernels` each precision
    runs without and with them. Returns the results, and whether all are no further from float32 than `TOLERATED` times as
    far as rows one at a time without kernels in the same precision. Writes results.json after each precision.
    """
    keys = recipe_values(options.recipe_keys, options)
    raise_all([*problems_of(keys, options.precisions)])
    make_output_dir(options.output_dir)
    model_dir = random_model_of(options) if options.config else None
    results: list[dict[str, Any]] = []
    reference: tuple[Losses, dict[str, torch.Tensor]] | None = None
    good = True
    kernels = read_recipe(options.recipe, keys).model.fused_kernels
    limits: dict[str, float] = {}
    for precision, fused in product(options.precisions, (None, kernels) if kernels else (None,)):
        own: dict[str, Any] = {**settings_of(precision, options.precisions), "packing": True}
        if (own.get("load_in_fp8") or own.get("fp8_gradients")) and not fused:
            own["fp8_kernels"] = None
        own |= {"output_dir": str(options.output_dir / "runs"), **NEEDED, "gradient_checkpointing": False}
        own |= {"model_name_or_path": str(model_dir)} if model_dir else {}
        trainer, data = _load(options, {**TRAINING_ALONE, **own, **keys, "fused_kernels": fused})
        for name, batches in _ways(data, trainer.data_collator, options.rows, options.tokens_per_batch):
            # float32 is what all is compared with; a library that is installed multiplies it as TF32.
            exact = not fused or precision == "float32"
            with padded_in_torch(trainer.model) if exact else nullcontext():
                found = _losses_and_gradients(trainer, batches, data)
            reference = reference or found
            result: dict[str, Any] = {"precision": precision, "rows": name, **_differences(found, reference)}
            result["kernels"] = "fused" if fused else "plain"
            results.append(result)
            print(f"compared: {precision}, {name}, {result['kernels']} kernels", flush=True)
            # That of the first: one row at a time, without kernels.
            limit = limits.setdefault(precision, max(TOLERATED * result["gradient"], ROUNDING))
            good = good and result["gradient"] <= limit
        _write_results(options, results)
        del trainer
        torch.cuda.empty_cache()
    return results, good


def _write_results(options: CheckPackingOptions, results: list[dict[str, Any]]) -> None:
    # After each precision, so that results are kept if the run ends early.
    text = json.dumps({**machine_facts(), "rows": options.rows, "results": results}, indent=2)
    (options.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")


def problems_of(keys: Mapping[str, Any], precisions: Collection[str]) -> Iterator[str]:
    """Yield the recipe keys that the comparison sets itself: with others a precision's name would be wrong."""
    for key, value in NEEDED.items():
        if keys.get(key, value) != value:
            yield f"--{key}: the comparison needs {str(value).lower()}; leave it out"
    if "packing" in keys:
        yield "--packing: all ways are compared, packed and not; leave it out"
    settings = {precision: settings_of(precision, precisions) for precision in precisions}
    yield from contradictions(keys, "precisions", settings)


def settings_of(precision: str, all_precisions: Collection[str]) -> dict[str, Any]:
    """Return the recipe keys of a precision that is compared with others. Raises `UserError` for an unknown one."""
    if precision not in PRECISIONS | BASES:
        raise UserError(f"--precisions: {quoted(precision)} is unknown; known are {', '.join(PRECISIONS | BASES)}")
    plain = {} if set(all_precisions) <= PRECISIONS.keys() else IN_16_BITS
    return {**PRECISIONS.get(precision, _BF16), **plain, **BASES.get(precision, {})}


def _load(options: CheckPackingOptions, keys: dict[str, Any]) -> tuple[Any, PreparedData]:
    run, data = set_up(options.recipe, keys)
    trainer: Any = build_trainer(run, sft_config(run), data)
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=numbers) * LORA_B_STD
            parameter.data.copy_(drawn)
    return trainer, data


def _ways(data: PreparedData, collator: Any, rows: int, budget: int) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """Yield the same rows in batches of four kinds."""
    assert isinstance(data.train, Scan)
    assert isinstance(collator, PackedCollator)
    padded: Collator = collator.rows
    # All rows, so that rows of one image are together.
    sizes, batch = data.train.lengths, GlobalBatch(rows=rows)
    if not collator.positions.family.shared_openings:
        sizes = sizes.without_opening()
    chosen = StepPlan(sizes, batch, budget, 1, 0, share_prefixes=True).order(0)[:rows].tolist()
    for name, size in (("one at a time", 1), (f"{PADDED_ROWS} padded", PADDED_ROWS)):
        groups = [chosen[start : start + size] for start in range(0, rows, size)]
        yield name, (padded([{"row": row} for row in group]) for group in groups)
    for name, share in (("packed", False), ("packed, shared", True)):
        (batches,) = StepPlan(sizes, batch, budget, 1, 0, share_prefixes=share).split(chosen)
        yield name, (batch for micro in batches for batch in collator.sharing(share)([micro])[MICRO_BATCHES])


def _losses_and_gradients(
    trainer: Any, batches: Iterator[dict[str, Any]], data: PreparedData
) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Return the loss of every target token by row, and the gradient of their sum by adapter tensor."""
    # In training the packed attention refuses a batch without boundaries; dropout and checkpointing are off anyway.
    model: nn.Module = trainer.model.eval()
    model.zero_grad(set_to_none=True)
    losses: Losses = {}
    assert isinstance(data.train, Scan)
    ids, counts = data.train.rows.dataset["row_id"], data.train.lengths.target_tokens  # type: ignore[index]
    learned = {int(row): int(count) for row, count in zip(ids, counts, strict=True)}
    for batch in batches:
        del batch["stats"]
        rows = batch.pop("row_ids")
        with trainer.accelerator.autocast():
            outputs = model(**trainer._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
        (-outputs.log_probs).sum().backward()
        found = -outputs.log_probs.detach()[outputs.label_mask.bool()].float().cpu()
        for row, part in zip(rows, found.split([learned[row] for row in rows]), strict=True):
            losses[row] = part.tolist()
    gradients = {
        name: parameter.grad.float().cpu() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return losses, gradients


def _differences(
    found: tuple[Losses, dict[str, torch.Tensor]], reference: tuple[Losses, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Return mean and largest difference of token losses in nats, and |a - b| / |b| of all gradients together."""
    values, wanted = (
        torch.tensor([loss for row in sorted(part[0]) for loss in part[0][row]]) for part in (found, reference)
    )
    apart = (values - wanted).abs()
    squares = [
        ((found[1][name] - grad).double().square().sum(), grad.double().square().sum())
        for name, grad in reference[1].items()
    ]
    distance, size = (torch.stack(list(part)).sum().sqrt() for part in zip(*squares, strict=True))
    return {
        "loss": float(values.mean()),
        "token_loss_mean": float(apart.mean()),
        "token_loss_largest": float(apart.max()),
        "gradient": float(distance / size),
    }
