"""Merging an adapter into its base model, shard by shard, so that memory stays near one shard and the adapter.

A merge goes into the base's own 16-bit or 32-bit weights, never into 4-bit ones: W + scaling * B A (Hu et al. 2021,
https://arxiv.org/abs/2106.09685), summed in float32 and rounded once. The result is written beside its place, verified,
and only then moved there.
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.merging.base import (
    HEAD,
    INDEX,
    WEIGHTS,
    Adapter,
    Weight,
    download,
    open_weights,
    quantized_layers,
    read_adapter,
    read_base,
)
from qwen_vl_sft.merging.folder import NOTHING_LEFT, staged, write_companions
from qwen_vl_sft.merging.plan import REPORT_FILE, Plan
from qwen_vl_sft.modeling.base_model import build_on_meta


@dataclass
class Merge:
    """What goes where: `weights` are the base's tensors and, when the adapter `unties` it, the output head."""

    plan: Plan
    folder: Path
    weights: list[Weight]
    adapter: Adapter
    quantized: set[str]
    unties: bool
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the merged weights."""
        return getattr(torch, self.plan.options.dtype)

    def before(self, weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor as the adapter is added to it: dequantized where training held it in 4 bits."""
        if weight.module in self.quantized:
            return requantized(tensor, self.plan.trained, "cpu" if self.plan.on_cpu else "cuda")
        return tensor

    def after(self, weight: Weight, before: torch.Tensor) -> torch.Tensor:
        """The merged tensor, in the precision of the output."""
        if weight.name in self.adapter.whole:
            return self.adapter.whole[weight.name].to(self.dtype)
        if weight.module in self.adapter.pairs:
            a, b, scaling = self.adapter.pairs[weight.module]
            return (before.float() + (b.float() @ a.float()) * scaling).to(self.dtype)
        return before.to(self.dtype)

    def is_target(self, weight: Weight) -> bool:
        """Whether the adapter changes this tensor."""
        return weight.module in self.adapter.pairs or weight.name in self.adapter.whole


def merge(plan: Plan) -> dict[str, Any]:
    """Merge, verify and put in place; returns the figures of `format_report`. Raises `UserError`, and then leaves nothing."""
    from qwen_vl_sft.merging.check import check_model, check_weights
    from qwen_vl_sft.merging.samples import read_samples

    task, samples = prepare(plan), read_samples(plan)
    output = plan.options.output_dir
    with staged(output, size_of(task)) as folder:
        with writing_to(output, NOTHING_LEFT):
            task.report["shards"] = write_weights(task, folder)
            write_companions(plan, task.folder, task.unties, folder)
        task.report["peak_memory_writing"] = peak_memory()
        check_weights(task, folder)
        try:
            task.report |= check_model(task, folder, samples)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--samples: the GPU's memory does not hold the model that is compared ({first_line(error)}); hide"
                f" the GPU with CUDA_VISIBLE_DEVICES='', or give --samples 0 to merge without comparing logits"
            ) from error
        task.report["peak_memory"] = peak_memory()
        with writing_to(output, NOTHING_LEFT):
            (folder / REPORT_FILE).write_text(json.dumps(task.report, indent=2) + "\n", encoding="utf-8")
    return task.report


def prepare(plan: Plan) -> Merge:
    """Read the structure of the base and the adapter, and check that they belong together. Raises `UserError`."""
    folder = download(plan.base)
    named = plan.base
    plan = replace(plan, base=stored_in(folder, plan.base), trained=stored_in(folder, plan.trained))
    model = build_on_meta(plan.base)
    weights = read_base(folder, model)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    adapter = read_adapter(plan.tuned.folder, model)
    # Embeddings or an output head trained in full are no longer one tensor.
    unties = any(name in adapter.whole for pair in tied.items() for name in pair)
    if unties and not any(weight.name == HEAD for weight in weights):
        embeddings = next(weight for weight in weights if weight.name == tied[HEAD])
        weights.append(replace(embeddings, name=HEAD, written_as=HEAD))
    quantized = quantized_layers(plan.trained) if plan.options.nf4_aware else set()
    report = {
        "run": str(plan.tuned.folder),
        "base": named.model_name_or_path,
        # The folder of a Hub model's files is named after the commit.
        "base_revision": None if Path(named.model_name_or_path or "").is_dir() else folder.name,
        "dtype": plan.options.dtype,
        "nf4_aware": plan.options.nf4_aware,
        "trained_in_4bit": plan.trained.load_in_4bit,
        "targets": len(adapter.pairs),
        "replaced": sorted(adapter.whole),
        "tensors": len(weights),
    }
    task = Merge(plan, folder, weights, adapter, quantized, unties, report)
    task.report["bytes"] = size_of(task)
    return task


def stored_in(folder: Path, settings: ModelSettings) -> ModelSettings:
    """The same settings for a base model whose files lie in `folder`."""
    return replace(settings, model_name_or_path=str(folder), model_revision="main")


def requantized(tensor: torch.Tensor, trained: ModelSettings, device: str) -> torch.Tensor:
    """A weight after the 4-bit rounding of training, in training's precision; quantized on `device`, as on loading."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    packed: Any = Params4bit(
        tensor.to(getattr(torch, trained.dtype)),
        requires_grad=False,
        quant_type=trained.bnb_4bit_quant_type,
        compress_statistics=trained.use_bnb_nested_quant,
    )
    packed = packed.to(device)
    return dequantize_4bit(packed.data, packed.quant_state).cpu()


def write_weights(task: Merge, folder: Path) -> int:
    """Write the merged shards and their index; returns the number of shards."""
    shards = plan_shards(task)
    names = [WEIGHTS] if len(shards) == 1 else [shard_name(place, len(shards)) for place in range(len(shards))]
    with tqdm(total=len(task.weights), desc="merging", unit="tensor") as progress:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for weight in shard:
                with open_weights(weight.file) as file:
                    before = task.before(weight, file.get_tensor(weight.key))
                tensors[weight.output] = task.after(weight, before).contiguous()
                progress.update()
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {weight.output: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": size_of(task)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def plan_shards(task: Merge) -> list[list[Weight]]:
    """The tensors in the base's order, in files of at most `max_shard_size`; a larger tensor gets a file of its own."""
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in task.weights:
        size = bytes_of(task, weight)
        if shards[-1] and filled + size > task.plan.options.max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return shards


def shard_name(place: int, count: int) -> str:
    """The name of a shard, as transformers writes it."""
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def bytes_of(task: Merge, weight: Weight) -> int:
    """Bytes of a tensor in the output."""
    return int(torch.Size(weight.shape).numel()) * task.dtype.itemsize


def size_of(task: Merge) -> int:
    """Bytes of all tensors of the output."""
    return sum(bytes_of(task, weight) for weight in task.weights)


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
