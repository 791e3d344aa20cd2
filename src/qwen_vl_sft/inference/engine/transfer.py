"""Send tensors between the host and the model's device without waiting for what the device computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Memory that a GPU reads and writes by itself is taken in such blocks: taking it is slow.
_BLOCK = 2**28


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a tensor of the host to a device; on a GPU it arrives before what is computed next, and nobody waits."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True)
class Arriving:
    """Numbers on their way to the host."""

    numbers: torch.Tensor
    event: Any

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Arriving:
        """Send for numbers of a device, as they are once what has been started is computed."""
        if numbers.device.type == "cpu":
            return cls(numbers.clone(), None)  # the next step may write where they are
        sent = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(sent, event)

    def wait(self) -> list[int]:
        """Return them, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.numbers.tolist()  # type: ignore[no-any-return]


class PinnedMemory:
    """Memory of the host that a GPU copies into and out of by itself; it is given back as a whole."""

    def __init__(self) -> None:
        self._block = torch.zeros(0, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of a GPU into it; what is there may only be sent back to the same GPU, which keeps the order."""
        found = self._take(tensor.shape, tensor.dtype)
        found.copy_(tensor, non_blocking=True)
        return found

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._block):
            self._block = torch.empty(max(size, _BLOCK), dtype=torch.uint8, pin_memory=True)
        taken, self._block = self._block[:size], self._block[-(-size // 64) * 64 :]
        return taken.view(dtype).view(*shape)
