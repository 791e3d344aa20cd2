"""The weights of a merge: each merged tensor, and the shards that they are written to.

A merge goes into the base's own 16-bit or 32-bit weights, never into 4-bit ones: W + scaling * B A (Hu et al. 2021,
https://arxiv.org/abs/2106.09685), summed in float32 and rounded once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from qwen_vl_sft.compat.for_bitsandbytes import unpack_rows_by_blocks
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.merging.adapter import Adapter
from qwen_vl_sft.merging.base import INDEX, WEIGHTS, Weight
from qwen_vl_sft.merging.plan import MergePlan
from qwen_vl_sft.modeling.fp8.weights import dequantize, quantize_rows


@dataclass
class Merge:
    """A prepared merge: `weights` are the base's tensors, and the output head where the adapter `unties` it."""

    plan: MergePlan
    folder: Path
    weights: list[Weight]
    adapter: Adapter
    quantized: set[str]
    unties: bool
    report: dict[str, Any] = field(default_factory=dict)
    # The last experts' parameter that was quantized whole, for the pieces of it that follow.
    _stack: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the merged weights."""
        return getattr(torch, self.plan.options.dtype)

    def before(self, weight: Weight, tensor: torch.Tensor) -> torch.Tensor:
        """Return the base's tensor that the adapter is added to: rounded to 4 bits or FP8 and back if asked for."""
        if weight.target not in self.quantized:
            return tensor
        if weight.place.expert is None:
            return requantized(tensor, self.plan.trained, self._device)
        # Training quantized the experts of a layer together.
        if self._stack.get("name") != weight.name:
            pieces = [piece for piece in self.weights if piece.name == weight.name]
            whole = torch.empty(weight.whole, dtype=tensor.dtype)
            for piece in pieces:
                piece.within(whole).copy_(piece.read())
            self._stack = {"name": weight.name, "values": requantized(whole, self.plan.trained, self._device)}
        return weight.within(self._stack["values"])

    @property
    def _device(self) -> str:
        return "cpu" if self.plan.on_cpu else "cuda"

    def read(self, weight: Weight) -> torch.Tensor:
        """Read the base's tensor that the adapter is added to, as the model has it."""
        return self.before(weight, weight.read())

    def after(self, weight: Weight, before: torch.Tensor) -> torch.Tensor:
        """Return the merged tensor in the precision of the output."""
        if weight.name in self.adapter.whole:
            return self.adapter.whole[weight.name].to(self.dtype)
        pair = self.adapter.reaching(weight)
        return (before if pair is None else pair.added_to(before)).to(self.dtype)

    def is_target(self, weight: Weight) -> bool:
        """Return whether the adapter changes this tensor."""
        return weight.name in self.adapter.whole or self.adapter.reaching(weight) is not None


def requantized(tensor: torch.Tensor, trained: ModelSettings, device: str) -> torch.Tensor:
    """Quantize a weight on `device`, as training did on loading, and dequantize it to training's precision.

    FP8 weights have their exact values in every precision, as their scales are powers of two.
    """
    if trained.load_in_fp8:
        dtype = getattr(torch, trained.dtype)
        rows = tensor.to(dtype).reshape(-1, tensor.shape[-1])
        return dequantize(*quantize_rows(rows)).to(dtype).view(tensor.shape)
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    if device == "cpu":
        unpack_rows_by_blocks()
    packed: Any = Params4bit(
        tensor.to(getattr(torch, trained.dtype)),
        requires_grad=False,
        quant_type=trained.bnb_4bit_quant_type,
        compress_statistics=trained.use_bnb_nested_quant,
    )
    packed = packed.to(device)
    return dequantize_4bit(packed.data, packed.quant_state).cpu()


def write_weights(task: Merge, folder: Path) -> int:
    """Write the merged shards and their index; return the number of shards."""
    shards = plan_shards(task)
    names = [WEIGHTS] if len(shards) == 1 else [shard_name(index, len(shards)) for index in range(len(shards))]
    with tqdm(total=len(task.weights), desc="merging", unit="tensor") as progress:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for weight in shard:
                after = task.after(weight, task.read(weight))
                tensors[weight.output] = weight.as_in_file(after).contiguous()
                progress.update()
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        files = {weight.output: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": size_of(task)}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def plan_shards(task: Merge) -> list[list[Weight]]:
    """Split the tensors, in the base's order, into files of at most `max_shard_size`; a larger tensor fills its own."""
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


def shard_name(index: int, count: int) -> str:
    """Return the name of a shard, as transformers writes it."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def bytes_of(task: Merge, weight: Weight) -> int:
    """Return the bytes of a tensor in the output."""
    return int(torch.Size(weight.shape).numel()) * task.dtype.itemsize


def size_of(task: Merge) -> int:
    """Return the bytes of all tensors of the output."""
    return sum(bytes_of(task, weight) for weight in task.weights)
