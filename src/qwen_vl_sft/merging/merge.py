"""Merge an adapter into its base model, shard by shard, so that memory stays near one shard and the adapter.

The result is written to a temporary folder, checked, and only then moved to the output folder.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.inference.trained_base import check_same_base
from qwen_vl_sft.merging.adapter import read_adapter
from qwen_vl_sft.merging.base import HEAD, download, holds_fp8, quantized_layers, read_base
from qwen_vl_sft.merging.check import check_model, check_weights
from qwen_vl_sft.merging.folder import NOTHING_LEFT, staged, write_companions
from qwen_vl_sft.merging.fp8_bases import check_fp8_base, of_training
from qwen_vl_sft.merging.places import Place
from qwen_vl_sft.merging.plan import REPORT_FILE, MergePlan
from qwen_vl_sft.merging.samples import read_samples
from qwen_vl_sft.merging.weights import Merge, size_of, write_weights
from qwen_vl_sft.modeling.base_model import build_on_meta


def merge(plan: MergePlan) -> dict[str, Any]:
    """Merge, check and move to the output folder; return the report. Raises `UserError`, and then leaves nothing."""
    task, samples = prepare(plan), read_samples(plan)
    output, report = plan.options.output_dir, {**task.report, "bytes": size_of(task)}
    with staged(output, size_of(task)) as folder:
        with writing_to(output, NOTHING_LEFT):
            report["shards"] = write_weights(task, folder)
            write_companions(plan, task.folder, task.unties, folder)
        report["peak_memory_writing"] = peak_memory()
        check_weights(task, folder)
        try:
            report |= check_model(task, folder, samples)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--samples: the GPU's memory does not hold the model that is compared ({first_line(error)}); hide"
                f" the GPU with CUDA_VISIBLE_DEVICES='', or give --samples 0 to merge without comparing logits"
            ) from error
        report["peak_memory"] = peak_memory()
        with writing_to(output, NOTHING_LEFT):
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def prepare(plan: MergePlan) -> Merge:
    """Read the structure of base and adapter, and check that they fit. Raises `UserError`."""
    folder = download(plan.base)
    named, in_fp8 = plan.base, holds_fp8(folder)
    if in_fp8:
        # Read as it is, where training read FP8 weights.
        plan = replace(plan, base=replace(plan.base, load_in_fp8=plan.trained.load_in_fp8))
    check_fp8_base(plan, in_fp8)
    check_base(plan)
    trained = of_training(plan, stored_in(folder, plan.trained), in_fp8)
    plan = replace(plan, base=stored_in(folder, plan.base), trained=trained)
    model = build_on_meta(plan.base)
    weights = read_base(folder, model)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    adapter = read_adapter(plan.tuned.folder, model)
    # Embeddings or an output head trained in full are no longer one tensor.
    unties = any(name in adapter.whole for pair in tied.items() for name in pair)
    if unties and not any(weight.name == HEAD for weight in weights):
        embeddings = next(weight for weight in weights if weight.name == tied[HEAD])
        weights.append(replace(embeddings, place=Place(HEAD), written_as=HEAD))
    quantized = quantized_layers(plan.trained) if plan.keeps_trained and not in_fp8 else set()
    report = {
        "run": str(plan.tuned.folder),
        "base": named.model_name_or_path,
        # The folder of a Hub model's files is named after the commit.
        "base_revision": None if Path(named.model_name_or_path or "").is_dir() else folder.name,
        "dtype": plan.options.dtype,
        "nf4_aware": plan.options.nf4_aware,
        "fp8_aware": plan.options.fp8_aware,
        "trained_in_4bit": plan.trained.load_in_4bit,
        "trained_in_fp8": bool(plan.trained.load_in_fp8),
        "targets": len(adapter.pairs),
        "replaced": sorted(adapter.whole),
        "tensors": len(weights),
    }
    return Merge(plan, folder, weights, adapter, quantized, unties, report)


def check_base(plan: MergePlan) -> None:
    """Raise `UserError` where the base model is another one than the adapter was trained on; with --base only warn."""
    tuned, name = plan.tuned, plan.recipe.model.model_name_or_path
    try:
        check_same_base(
            tuned.folder, tuned.home, name, plan.base, "--run", "name the base model it was trained on with --base"
        )
    except UserError as error:
        if not plan.options.base:
            raise
        # Meant, say for the same weights in other files.
        print(f"warning: {error}", file=sys.stderr, flush=True)


def stored_in(folder: Path, settings: ModelSettings) -> ModelSettings:
    """Return the same settings for a base model whose files are in `folder`."""
    return replace(settings, model_name_or_path=str(folder), model_revision="main")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
