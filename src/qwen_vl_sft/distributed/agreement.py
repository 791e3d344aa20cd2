"""Flags that all processes share at the end of a step, without any of them waiting for its GPU."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """Share the largest of each flag over all processes.

    On a GPU the result of a step is read at the end of the next one: the host, which runs ahead of the device, then
    finds it there. On a CPU it is read at once.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._result: torch.Tensor | None = None
        self._copied = torch.cuda.Event() if self.on_gpu else None

    def post(self, flags: torch.Tensor) -> None:
        """Post the flags of this process, a tensor on its device. All processes must call this together."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if self._copied is None:
            self._result = flags
            return
        self._result = torch.empty_like(flags, device="cpu", pin_memory=True)
        self._result.copy_(flags, non_blocking=True)
        self._copied.record()

    def read(self) -> list[float] | None:
        """Return the flags posted last and not read yet, or None."""
        result, self._result = self._result, None
        if result is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        return result.tolist()
