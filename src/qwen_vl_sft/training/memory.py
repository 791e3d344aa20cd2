"""Activation checkpointing no further than memory needs it, tried on the largest micro-batch before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen_vl_sft.batching.largest import largest_micro_batch
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES
from qwen_vl_sft.batching.packing import StepPlan, StepSampler
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.planning.memory import MARGIN
from qwen_vl_sft.random_state import kept_random_state
from qwen_vl_sft.resilience.faults import describe_micro_batch, explained_out_of_memory


@dataclass(frozen=True)
class Fit:
    """What was found: `checkpointed` of `layers`, and the bytes of the largest micro-batch and of what there is."""

    layers: int
    checkpointed: int
    peak: int
    room: int

    def __str__(self) -> str:
        peak, room = self.peak / 2**30, self.room / 2**30
        return f"{self.checkpointed} of {self.layers} layers checkpointed: {peak:.1f} of {room:.1f} GiB at most"


def room_for(plan: StepPlan, used: float, peak: float, room: float) -> int | None:
    """Return the `tokens_per_batch` that memory has room for, if that would make steps of fewer micro-batches; else None.

    Args:
        plan: of the run as it is.
        used: bytes in use when no micro-batch is computed.
        peak: bytes in use at most, with all activations of the plan's largest micro-batch; they grow with its tokens.
        room: bytes that may be used.
    """
    more = (room - used) / max(peak - used, 1)
    times = min(int(more), math.ceil(plan.packing_stats().micro_batches))
    return times * plan.tokens_per_batch if times > 1 else None


class DeviceMemory:
    """Memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def room(self) -> int:
        """Return the bytes that this process has or can get."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def used(self) -> int:
        """Return the bytes in use now."""
        return torch.cuda.memory_allocated(self.device)

    def peak_of(self, work: Callable[[], None]) -> int:
        """Return the most bytes in use while `work` runs."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device)

    def forget(self) -> None:
        """Reset the logged memory peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


class MemoryProbe(TrainerCallback):
    """Computes the largest micro-batch of a run before its first step: out of memory comes now, or never.

    With `automatic`, layers keep their activations from the last one on, which are used first, as far as memory allows;
    all processes agree on how many. Neither weights, gradients nor random numbers change.

    Args:
        trainer: computes it.
        largest: makes that micro-batch (`largest_batch`).
        automatic: choose which layers are checkpointed; otherwise all that the Trainer has set.
        plan: of packed rows; when memory has room for larger micro-batches, a line says so.
        memory: what is measured; None for the memory of the trainer's device.
        expected: the bytes that a plan expects with so many layers checkpointed; the first trial is near them. None
            where there is no plan.

    `fit` is what was found, None before training begins.
    """

    def __init__(
        self,
        trainer: Any,
        largest: Callable[[], dict[str, Any]],
        automatic: bool,
        plan: StepPlan | None = None,
        memory: Any = None,
        expected: Callable[[int], float] | None = None,
    ) -> None:
        self.trainer = trainer
        self.largest = largest
        self.automatic = automatic
        self.plan = plan
        self.expected = expected
        self.memory = memory or DeviceMemory(trainer.args.device)
        self.fit: Fit | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try it: the model is wrapped and the checkpoint loaded by now. Raises `UserError` when memory does not suffice."""
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        layers = checkpointed_layers(model)
        batch = self.largest()
        rows = batch.pop("row_ids")
        del batch["stats"]
        to_come = bytes_to_come(model, trainer.optimizer, trainer.is_deepspeed_enabled)
        used = self.memory.used() + to_come

        def peak(kept: int) -> float:
            _checkpoint_all_but(kept, layers)
            try:
                found = self._peak(model, batch, rows, checkpointing=kept == 0) + to_come
            except UserError:
                # Parts of a model that is split over processes wait for each other, and would for ever after an error.
                if not kept or trainer.is_fsdp_enabled:
                    raise
                found = math.inf
            return _over_processes(trainer.accelerator, found)

        room = -_over_processes(trainer.accelerator, -self.memory.room() * (1 - MARGIN))
        guess = self._guess(len(layers), room)
        kept, most = choose(peak, len(layers), room, guess) if self.automatic else (0, peak(0))
        _checkpoint_all_but(kept, layers)
        self.memory.forget()
        self.fit = Fit(len(all_layers(model)), len(layers) - kept, int(most), int(room / (1 - MARGIN)))
        if state.is_world_process_zero:
            print(f"memory      {self.fit}", flush=True)
            larger = room_for(self.plan, used, most, room) if self.plan and kept == len(layers) else None
            if larger:
                print(f"            room for tokens_per_batch: {larger}, fewer and larger micro-batches", flush=True)

    def _guess(self, layers: int, room: float) -> int | None:
        """Return how many layers could keep their activations by the plan, a little below it."""
        # An error in a trial must not happen where processes wait for each other.
        if self.expected is None or self.trainer.is_fsdp_enabled:
            return None
        checkpointed = (count for count in range(layers + 1) if self.expected(count) <= room)
        return int(0.9 * (layers - next(checkpointed, layers)))

    def _peak(self, model: Any, batch: dict[str, Any], rows: list[int], checkpointing: bool) -> float:
        inputs = self.trainer._prepare_inputs(dict(batch))
        described = describe_micro_batch(rows, inputs)
        explained = explained_out_of_memory(described, "cu_seq_lens_q" in inputs, checkpointing)
        with kept_random_state(), explained:
            return self.memory.peak_of(lambda: _forward_and_backward(self.trainer, model, inputs))


def found_fit(trainer: Any) -> Fit | None:
    """Return what the probe of a trainer has found, None without one."""
    fits = [entry.fit for entry in trainer.callback_handler.callbacks if isinstance(entry, MemoryProbe)]
    return next((fit for fit in fits if fit), None)


def largest_batch(collator: Any, scan: Scan, sampler: Any, rows: int) -> dict[str, Any]:
    """Make the micro-batch that needs most: of the packed steps of `sampler`, else of the `rows` longest rows padded."""
    if isinstance(sampler, StepSampler):
        batch = collator([largest_micro_batch(sampler.plan)])[MICRO_BATCHES][0]
    else:
        batch = collator([{"row": int(row)} for row in np.argsort(-scan.lengths.tokens, kind="stable")[:rows]])
    return batch


def choose(peak: Callable[[int], float], layers: int, room: float, guess: int | None = None) -> tuple[int, float]:
    """Return the largest number of layers that can keep their activations, and the peak then, in few trials.

    The first trial is `guess`, where there is one. `peak` tells the bytes needed when so many do, and grows with them.
    The peak with none is returned even if it is above `room`: it has been seen to work.
    """
    fits, above = 0, layers + 1
    known = {0: peak(0)}
    while above - fits > 1 and known[fits] < room:
        tried = _next_trial(known, fits, above, room, guess)
        known[tried] = peak(tried)
        if known[tried] <= room:
            fits = tried
        else:
            above = tried
    return fits, known[fits]


def _next_trial(known: dict[int, float], fits: int, above: int, room: float, guess: int | None) -> int:
    """Choose along the line through the last two that fit, but never far: it may be flat where something else needs more."""
    below = max((number for number in known if number < fits), default=None)
    if below is None:
        first = guess if guess and len(known) == 1 else 4
        return min(first, above - 1)
    slope = (known[fits] - known[below]) / (fits - below)
    reach = int((room - known[fits]) / slope) if slope > 0 else above
    return max(fits + 1, min(fits + reach, 3 * fits + 4, above - 1))


def all_layers(model: nn.Module) -> list[Any]:
    """Return the layers of the model that a gradient passes, in the order of computation."""
    part_of = family_of(model.config).part_of
    return [
        module
        for name, module in sorted(model.named_modules(), key=lambda entry: part_of(entry[0]) == "language")
        if isinstance(module, GradientCheckpointingLayer) and (part_of(name) == "language" or _trains(module))
    ]


def checkpointed_layers(model: nn.Module) -> list[Any]:
    """Return the checkpointed layers."""
    return [layer for layer in all_layers(model) if layer.gradient_checkpointing]


def bytes_to_come(model: nn.Module, optimizer: Any, deepspeed: bool) -> int:
    """Return the bytes of gradients and Adam's two moments that the first step allocates; DeepSpeed has its own already."""
    total = 0
    state = getattr(optimizer, "optimizer", optimizer).state if optimizer is not None else {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter))
            size = local.numel() * local.element_size()
            total += size if parameter.grad is None else 0
            total += 0 if deepspeed or parameter in state else 2 * size
    return total


def _checkpoint_all_but(kept: int, layers: list[Any]) -> None:
    """Have the last ones keep their activations: these are used first, and gone when the others are computed again."""
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < len(layers) - kept


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _forward_and_backward(trainer: Any, model: Any, inputs: dict[str, Any]) -> None:
    """Compute a micro-batch down to the gradient of its embedded tokens, which leaves no gradient in any weight.

    So nothing is reduced over processes, and no strategy takes it for a step.
    """
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return output

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        model.train()
        # With `activation_offloading` what a step keeps lies on the CPU.
        with trainer.maybe_activation_offload_context:
            with trainer.compute_loss_context_manager():
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            torch.autograd.grad(-outputs.log_probs.sum(), embedded[0])
    finally:
        hook.remove()


def _over_processes(accelerator: Any, value: float) -> float:
    """Return the largest of all processes."""
    if accelerator.num_processes == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.item()
