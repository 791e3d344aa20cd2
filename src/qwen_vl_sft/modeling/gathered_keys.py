"""Gather keys and values for the rows that share them; the gradients of a token's copies are summed in one fixed order.

PyTorch adds them up in their own type and in an order that changes from run to run.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qwen_vl_sft.modeling.kernel_check import distance, is_right

# Tokens and copies of an example: some tokens have no copy, some have several.
_TOKENS, _COPIES = 41, 100


class Copies(NamedTuple):
    """Where the copies of each of T tokens are among K: token t's are `order[starts[t] : starts[t + 1]]`, ascending."""

    order: torch.Tensor
    starts: torch.Tensor


# Of the micro-batch that is computed: all its layers have one index.
_KNOWN = WeakTensorKeyDictionary()


def gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the tokens `index` [K] of keys or values [T, heads, D] -> [K, heads, D]."""
    if not (torch.is_grad_enabled() and tensor.requires_grad and _has_kernel(tensor)):
        return tensor.index_select(0, index)
    if index not in _KNOWN:
        _KNOWN[index] = copies_of(index, len(tensor))
    return Gathered.apply(tensor, index, *_KNOWN[index])  # type: ignore[no-any-return]


def copies_of(index: torch.Tensor, tokens: int) -> Copies:
    """Return where the copies of so many tokens are in what `index` [K] gathers. Nothing waits for the GPU."""
    numbers, order = index.sort(stable=True)
    return Copies(order, torch.searchsorted(numbers, torch.arange(tokens + 1, device=index.device)))


class Gathered(torch.autograd.Function):
    """The tokens `index` of a tensor [T, ...]."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: torch.Tensor, *copies: torch.Tensor) -> torch.Tensor:
        """Gather them."""
        ctx.save_for_backward(*copies)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Sum the gradients of each token's copies, in float32."""
        from qwen_vl_sft.modeling.gathered_keys_kernel import sum_copies

        return sum_copies(grads[0], *ctx.saved_tensors), None, None, None


def _has_kernel(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and _is_right(tensor[0].numel(), tensor.dtype, tensor.device)


@functools.cache
def _is_right(size: int, dtype: torch.dtype, device: torch.device) -> bool:
    def difference() -> float:
        from qwen_vl_sft.modeling.gathered_keys_kernel import sum_copies

        # A separate generator, so that training's random numbers do not change.
        numbers = torch.Generator(device).manual_seed(0)
        index = torch.randint(_TOKENS, (_COPIES,), generator=numbers, device=device)
        grad = torch.randn(_COPIES, size, generator=numbers, device=device).to(dtype)
        wanted = torch.zeros(_TOKENS, size, device=device).index_add_(0, index, grad.float())
        return distance(sum_copies(grad, *copies_of(index, _TOKENS)), wanted)

    return is_right(difference, f"gradients of {size} values of keys that rows share are added by PyTorch")
