"""Changes to PyTorch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch


def gather_bytes() -> None:
    """Have FSDP2 gather weights as bytes from now on, in this process.

    4-bit values lie in tensors of floats, since FSDP2 splits no others, and one in a thousand of these looks like NaN. On
    GPUs each process lays its share of a layer out with an operation that makes one NaN of all: QLoRA on more than one
    GPU trained on other weights than it had loaded, by 0.5% of a 7B's first loss. FSDP2 itself gathers weights of several
    types as bytes; here all are. `distributed.fsdp.altered_weights` checks the outcome when training begins.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    describe = collectives._get_all_gather_input_metadatas
    if describe.__module__ == __name__:
        return  # done before

    def described_as_bytes(param_all_gather_inputs: list[list[torch.Tensor]]) -> tuple[Any, Any, torch.dtype]:
        types, sizes, _ = describe(param_all_gather_inputs)
        return types, sizes, torch.uint8

    collectives._get_all_gather_input_metadatas = described_as_bytes


def turn_off_tf32_in_convolutions() -> None:
    """Compute convolutions in float32 too: what transformers sets for `tf32: false` reaches matrix products alone.

    The first layer of the vision tower is a convolution.
    """
    torch.backends.cudnn.allow_tf32 = False


def handle_sigterm_in_workers(handler: Callable[[int, Any], None]) -> None:
    """Give SIGTERM in the workers of data loaders to `handler`; call it before any data loader is read.

    PyTorch's own handler ends a worker on a SIGTERM that is not from its parent, and training with it. A job that is
    preempted gets the signal as a whole, and the step in progress still needs its workers.
    """
    from torch.utils.data._utils import signal_handling

    original = signal_handling._set_worker_signal_handlers

    def set_handlers() -> None:
        original()
        signal.signal(signal.SIGTERM, handler)

    signal_handling._set_worker_signal_handlers = set_handlers


def end_workers(loaders: Iterable[Any]) -> None:
    """End the workers of data loaders, which are kept between epochs.

    Where batches are pinned, PyTorch would wait five seconds for each when the process ends.
    """
    for loader in loaders:
        # accelerate's loaders hold the one that has the workers.
        iterator = getattr(getattr(loader, "base_dataloader", loader), "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
