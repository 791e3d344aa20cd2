"""Changes to PyTorch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from qwen_vl_sft.compat.registry import Patch

_COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"


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
        # accelerate's loaders wrap the loader that has the workers.
        iterator = getattr(getattr(loader, "base_dataloader", loader), "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()


def _copies_change_nans() -> bool:
    """Return whether a copy of bfloat16 values on a GPU, as FSDP2 makes it, changes bits of those that look like NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16)
    copied = torch.empty_like(bits).view(torch.bfloat16)
    torch._foreach_copy_([copied], [bits.view(torch.bfloat16)])
    return not torch.equal(copied.view(torch.int16), bits)


def _convolutions_keep_tf32() -> bool:
    """Return whether convolutions may still use TF32 when float32 precision is set to the highest."""
    backends: Any = torch.backends
    before, of_convolutions = backends.fp32_precision, backends.cudnn.conv.fp32_precision
    try:
        # PyTorch's default, which this process may have changed already.
        backends.cudnn.conv.fp32_precision = "tf32"
        backends.fp32_precision = "ieee"
        return bool(backends.cudnn.conv.fp32_precision == "tf32")
    finally:
        backends.fp32_precision, backends.cudnn.conv.fp32_precision = before, of_convolutions


def _sigterm_ends_workers() -> bool:
    """Return whether a process with PyTorch's handlers of workers ends by a SIGTERM from another process than its parent."""
    import subprocess

    ready, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        torch._C._set_worker_signal_handlers()
        os.write(tell, b".")
        time.sleep(10)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    return os.WIFSIGNALED(os.waitpid(worker, 0)[1])


def _ends_late() -> bool:
    """Return whether a process that keeps the worker of a loader of pinned batches takes seconds to end."""
    import subprocess
    import sys

    script = """
import time, torch
loader = torch.utils.data.DataLoader(range(2), num_workers=1, persistent_workers=True, pin_memory=True)
list(loader)
print(time.time())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return time.time() - float(ended.stdout) > 4


PATCHES = (
    Patch(
        name="gather_bytes",
        package="torch",
        broken="<=2.11",
        without="FSDP2 corrupts 4-bit weights during all-gather on GPUs: all NaN patterns become one.",
        applied_by="compat.for_torch.gather_bytes",
        links=(
            "https://github.com/pytorch/pytorch/issues/159333",
            "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945",
        ),
        needs="cuda",
        still_needed=_copies_change_nans,
        relies_on={f"{_COLLECTIVES}._get_all_gather_input_metadatas": ("param_all_gather_inputs",)},
        reads={f"{_COLLECTIVES}.foreach_all_gather": ("_get_all_gather_input_metadatas", "dtype == torch.uint8")},
    ),
    Patch(
        name="turn_off_tf32_in_convolutions",
        package="torch",
        broken="<=2.11",
        without="`tf32: false` leaves TF32 on in convolutions, of which the vision tower's first layer is one.",
        applied_by="compat.for_torch.turn_off_tf32_in_convolutions",
        links=("https://github.com/pytorch/pytorch/issues/179445",),
        still_needed=_convolutions_keep_tf32,
    ),
    Patch(
        name="handle_sigterm_in_workers",
        package="torch",
        broken="<=2.11",
        without="A SIGTERM to the whole job ends the workers of data loaders, and the step in progress with them.",
        applied_by="compat.for_torch.handle_sigterm_in_workers",
        links=("https://github.com/pytorch/pytorch/pull/3474",),
        still_needed=_sigterm_ends_workers,
        relies_on={"torch.utils.data._utils.signal_handling._set_worker_signal_handlers": ()},
        reads={"torch.utils.data._utils.worker._worker_loop": ("signal_handling._set_worker_signal_handlers()",)},
    ),
    Patch(
        name="end_workers",
        package="torch",
        broken="<=2.11",
        without="A process with pinned batches waits five seconds for each kept worker when it ends.",
        applied_by="compat.for_torch.end_workers",
        links=("https://github.com/pytorch/pytorch/issues/81794",),
        needs="cuda",
        still_needed=_ends_late,
        relies_on={"torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers": ()},
        reads={"torch.utils.data.DataLoader": ("self._iterator",)},
    ),
    Patch(
        name="limit_waits",
        package="torch",
        broken="<=2.11",
        kind="extension",
        without="A process group's time limit cannot be changed later: it stays at the day set for reading data, or at ten"
        " minutes.",
        applied_by="distributed.launch.limit_waits",
        relies_on={"torch.distributed.distributed_c10d._set_pg_timeout": ("timeout", "group")},
        reads={"torch.distributed.distributed_c10d._World": ("def pg_map",)},
    ),
    Patch(
        name="compile_in_one_thread",
        package="torch",
        broken="<=2.11",
        kind="extension",
        without="Every process of the run starts one more process per core, each importing PyTorch, to compile a few lines.",
        applied_by="modeling.kernels.use_fused_kernels",
        reads={"torch._inductor.config.decide_compile_threads": ("compile_threads = min(32, cpu_count)",)},
    ),
)
