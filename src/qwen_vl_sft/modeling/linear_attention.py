"""Kernels of linear attention: whether they run here, and have them compiled, tuned and compared before the run needs them.

Which packages a GPU needs depends on its Triton: docs/families.md has the table.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, Literal

import torch
from torch import nn

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.gated_delta_net import KEPT, TORCH, Operations, PackedForward, attended
from qwen_vl_sft.modeling.kernel_check import farthest, told_as_user_error

logger = logging.getLogger(__name__)
NAME = "linear_attention"
INSTALL = "pip install 'qwen_vl_sft[linear]'"
_LEAST_CAPABILITY = 8
# Of the modules that define the layers in transformers.
_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
# Rows of a packed sequence to tune on: the kernels are the same for any others.
_TUNED_ROWS = (700, 500, 900, 600) * 3
# After so many seconds something is being compiled.
_PATIENCE = 4.0
# Sequences whose kernels differ: rows from nothing; questions that go on from shared prefixes; prompts that are read, which
# leave their states to the tokens of their answers.
Kind = Literal["packed", "shared", "read"]


def obstacle(capability: int | None = None) -> str | None:
    """Return why the kernels cannot be used on this machine's GPU, None when they can.

    Asks the GPU itself when the major number of its compute capability is not given.
    """
    if importlib.util.find_spec("fla") is None:
        return f"flash-linear-attention (fla-core) is not installed: {INSTALL}"
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()[0]
    if capability is not None and capability < _LEAST_CAPABILITY:
        return "flash-linear-attention needs a GPU of compute capability 8.0 or newer"
    return None


def complete_installed() -> None:
    """Have an installed flash-linear-attention train on this GPU, whoever calls it: transformers does in padded batches."""
    if obstacle() is None:
        from qwen_vl_sft.families.delta_kernels import complete

        complete()


@contextmanager
def padded_in_torch(model: nn.Module) -> Iterator[None]:
    """Have transformers compute padded rows of a model in PyTorch's own operations.

    An installed flash-linear-attention multiplies float32 as TF32.
    """
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    replaced = [(module, name, getattr(module, name)) for module in modules for name in _RULES if hasattr(module, name)]
    for module, name, rule in replaced:
        setattr(module, name, inspect.unwrap(rule))
    try:
        yield
    finally:
        for module, name, rule in replaced:
            setattr(module, name, rule)


def why_slow() -> str:
    """Return one line: linear attention has no kernels in this run, why, and the way out."""
    reason = obstacle() or f"fused_kernels leaves {NAME} out: set it to auto"
    return (
        f"linear attention runs in PyTorch's own operations, which are exact and many times slower on a GPU: {reason}"
    )


def kernel_forward(layer: Any) -> Callable[..., torch.Tensor]:
    """Return the forward of a gated delta-net layer that computes packed sequences with the kernels, where they fit."""
    return PackedForward(_chosen, layer)


def _chosen(layer: Any, projected: torch.Tensor, pieces: dict[str, Any]) -> Operations:
    # float32 is for exactness.
    if not projected.is_cuda or projected.dtype not in (torch.bfloat16, torch.float16):
        return TORCH
    if KEPT in pieces:
        return _kernels().for_reading(layer, projected.dtype)
    return _kernels().for_layer(layer, projected.dtype, "shared" if "parents" in pieces else "packed")


class CheckedKernels:
    """Operations that compute a small example first when they meet layers of a new shape."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.checked: dict[Any, Operations] = {}

    def for_layer(self, layer: Any, dtype: torch.dtype, kind: Kind) -> Operations:
        """Return the operations, once they have been compared for such a layer and such sequences.

        Raises `UserError` on that first call when they fail there, or when output, gradients or states are wrong.
        """
        key = _key(layer, dtype, kind)
        if key not in self.checked:
            with _saying_that_it_compiles():
                self._check(layer, dtype, kind, _learns(kind))
            self.checked[key] = self.operations
        return self.checked[key]

    def for_reading(self, layer: Any, dtype: torch.dtype) -> Operations:
        """Return the operations for prompts that are read: PyTorch's own, with a warning, where they cannot be used.

        A run that trains with them does not end because of an evaluation.
        """
        try:
            return self.for_layer(layer, dtype, "read")
        except UserError as error:
            logger.warning("prompts are read in PyTorch's own operations, which take longer: %s", error)
            self.checked[_key(layer, dtype, "read")] = TORCH
            return TORCH

    def _check(self, layer: Any, dtype: torch.dtype, kind: Kind, learns: bool) -> None:
        from qwen_vl_sft.families.delta_check import TOLERANCE, differences, differences_reading

        heads = f"{layer.num_v_heads} heads of {layer.head_v_dim} values"
        way_out = f"leave {NAME} out of fused_kernels, for PyTorch's own operations"
        with told_as_user_error(f"fused_kernels: {NAME} does not run here with {heads}", way_out):
            # First what Triton tunes on: by the small example it would choose sizes that are slow in training.
            _run(self.operations, layer, dtype, kind, learns)
            if kind == "read":
                apart = differences_reading(self.operations, layer, dtype)
            else:
                apart = differences(self.operations, layer, dtype, kind == "shared", learns)
        worst = farthest(apart.values())
        # By identity: NaN equals nothing.
        name = next(name for name, one in apart.items() if one is worst)
        if not worst <= TOLERANCE:
            raise UserError(
                f"fused_kernels: {NAME} computes something else than linear attention with {heads}: its {name} is"
                f" {worst:.1%} off float32; {way_out}"
            )


_SIZES = ("num_v_heads", "key_dim", "value_dim", "head_k_dim", "head_v_dim", "conv_kernel_size", "activation")


def _key(layer: Any, dtype: torch.dtype, kind: Kind) -> tuple[Any, ...]:
    return (*(getattr(layer, name) for name in _SIZES), dtype, layer.conv1d.weight.device, kind, _learns(kind))


def _learns(kind: Kind) -> bool:
    return kind != "read" and not torch.is_inference_mode_enabled()


@functools.cache
def _kernels() -> CheckedKernels:
    from qwen_vl_sft.families.delta_kernels import KERNELS

    return CheckedKernels(KERNELS)


def tune(config: Any, dtype: torch.dtype, device: torch.device, shared: bool) -> float:
    """Compile, tune and compare the kernels for a model's configuration; returns the seconds it took.

    Triton keeps what it has compiled and which sizes were fastest (`TRITON_CACHE_DIR`), so that the next process is ready
    in seconds.
    """
    from qwen_vl_sft.families.delta_check import layer_of

    began = time.perf_counter()
    _kernels().for_layer(layer_of(config, device), dtype, "shared" if shared else "packed")
    torch.cuda.empty_cache()
    return time.perf_counter() - began


def _example(shared: bool) -> tuple[list[int], list[int | None]]:
    """Return lengths and parents of pieces like those of a run."""
    branches = [(place, length) for place in range(len(_TUNED_ROWS)) for length in (60, 40)] if shared else []
    lengths = [*_TUNED_ROWS, *(length for _, length in branches)]
    return lengths, [*[None] * len(_TUNED_ROWS), *(place for place, _ in branches)]


def _run(operations: Operations, layer: Any, dtype: torch.dtype, kind: Kind, learns: bool) -> None:
    from qwen_vl_sft.families.delta_check import drawn, pieces_on, read_example

    device, (lengths, parents) = layer.conv1d.weight.device, _example(kind != "packed")
    numbers = torch.Generator(device).manual_seed(0)
    example, inputs = drawn(layer, sum(lengths), dtype, numbers)
    if kind == "read":
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            read_example(operations, layer, example, lengths, parents, inputs)
        return
    leaves = [tensor.requires_grad_(learns) for tensor in inputs.values()]
    with torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=False):
        pieces = pieces_on(device, lengths, parents, layer.conv_kernel_size)
        output = attended(operations, example, pieces, *leaves)
        if learns:
            torch.autograd.grad(output, leaves, torch.ones_like(output))


@contextmanager
def _saying_that_it_compiles() -> Iterator[None]:
    """Print that kernels are being compiled if that takes long."""
    line = "linear      compiling and tuning the kernels of linear attention: once on a machine, minutes"
    timer = Timer(_PATIENCE, functools.partial(print, line, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
