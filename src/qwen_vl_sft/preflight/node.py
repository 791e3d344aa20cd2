"""What a process of the check finds out by itself: its GPU's free memory and speed, and the folders of its node."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.diagnosis.machine import Machine
from qwen_vl_sft.errors import first_line
from qwen_vl_sft.preflight.leftovers import remove_leftovers
from qwen_vl_sft.preflight.links import adapters

# Of a GPU's memory, that others may hold: its driver and the context of this process take some.
TAKEN = 0.1


@dataclass(frozen=True)
class Facts:
    """What one process has found.

    Attributes:
        node: its node.
        local_rank: its number there, which is its GPU's too.
        device: the GPU's name, or "CPU".
        faults: what alone makes this node unfit.
        notes: what is told.
        product: FLOP/s of a product of matrices in bfloat16; in float32 on a CPU.
        adapters: of NCCL_IB_HCA.
        refused: why a folder cannot be written here, by the name of the setting; for the first process of a node.
        cached: models and data of HF_HOME that are seen here.
    """

    node: str
    local_rank: int
    device: str
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    product: float
    adapters: str | None
    refused: dict[str, str]
    cached: tuple[str, ...]


def look(node: str, local_rank: int, output_dir: Path | None, wants_gpu: bool) -> Facts:
    """Check this process's GPU, and for the first process of a node its folders and shared memory."""
    faults: list[str] = []
    notes: list[str] = []
    refused: dict[str, str] = {}
    cached: tuple[str, ...] = ()
    if local_rank == 0:
        count, size = remove_leftovers()
        notes += [f"removed {count} files of ended jobs from /dev/shm, {size / 2**30:.1f} GiB"] if count else []
        refused, cached = look_at_folders(output_dir)
    device, product = "CPU", 0.0
    try:
        device, product, taken = _device(local_rank, wants_gpu)
        faults += [f"GPU {local_rank} ({device}): {taken}"] if taken else []
    except Exception as error:  # of the driver and of CUDA, which raise a dozen kinds
        faults.append(f"GPU {local_rank}: {first_line(error)}")
    return Facts(node, local_rank, device, tuple(faults), tuple(notes), product, adapters(), refused, cached)


def look_at_folders(output_dir: Path | None, machine: Machine | None = None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return which of output_dir and HF_HOME cannot be written and why, and what models and data HF_HOME shows."""
    machine = machine or Machine()
    folders = {"HF_HOME": machine.hub_home} | ({"output_dir": output_dir} if output_dir is not None else {})
    refused = {}
    for name, folder in folders.items():
        if reason := machine.refusal_to_write(folder):
            refused[name] = f"{folder} cannot be written: {reason}"
    try:
        seen = sorted(path.name for path in (machine.hub_home / "hub").iterdir() if "--" in path.name)
    except OSError:
        seen = []
    return refused, tuple(seen)


def _device(number: int, wants_gpu: bool) -> tuple[str, float, str | None]:
    """Return the name of a device, its speed, and what is wrong with its memory."""
    import torch

    if not wants_gpu:
        return "CPU", _speed(torch.device("cpu"), 512, 3), None
    assert torch.cuda.is_available(), "PyTorch sees no GPU"
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    taken = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are taken by other processes"
    name = torch.cuda.get_device_name(device)
    return name, _speed(device, 8192, 20), taken if total - free > TAKEN * total else None


def _speed(device: object, size: int, times: int) -> float:
    """Return the FLOP/s of products of square matrices, and that what they give is right."""
    import torch

    cuda = str(device) != "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32
    one, other = (torch.ones(size, size, device=str(device), dtype=dtype) for _ in range(2))
    began = 0.0
    for number in range(times + 3):
        if number == 3:
            _wait(cuda)
            began = time.perf_counter()
        product = one @ other
    _wait(cuda)
    seconds = time.perf_counter() - began
    assert bool((product == size).all()), "a product of matrices is wrong"
    return 2 * size**3 * times / seconds


def _wait(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()
