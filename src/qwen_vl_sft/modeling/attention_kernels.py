"""Choose the attention implementation, and give kernels that take row boundaries one interface."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import warnings
from typing import Any, Protocol

import torch

from qwen_vl_sft.cache_folder import cache_folder
from qwen_vl_sft.errors import UserError, first_line, quoted
from qwen_vl_sft.modeling.kernel_check import CheckedKernel

SDPA = "sdpa"  # PyTorch's own
# What can be installed beside it, the best first, by the names of the packages: two of them are imported as flash_attn.
FLASH = {
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
    "flash_attention_2": "flash-attn",
}
# The least compute capability (major) that a kernel for rows by their boundaries runs on.
_LEAST_CAPABILITY = {SDPA: 8, "flash_attention_2": 8, "flash_attention_3": 8, "flash_attention_4": 9}
# Taken by itself for packed rows alone, for which it has been measured; generation has not.
_PACKED_ALONE = ("flash_attention_4",)


class VarlenKernel(Protocol):
    """Attention inside segments of one row: q, k, v [T, heads, D] -> [T, heads, D].

    `bounds_q` and `bounds_k` [S + 1] int32 are where segments of queries and of keys begin and end, `longest_q` and
    `longest_k` their largest lengths. With `causal` a segment's last query sees all of its keys.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds_q: torch.Tensor,
        bounds_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        scale: float | None,
        causal: bool,
    ) -> torch.Tensor:
        """Compute attention."""


def resolve_attention(wanted: str, on_cpu: bool, dtype: str, packing: bool = False) -> str:
    """Return the attention implementation of a model: the wanted one, or for "auto" the best that is installed and fits.

    With `packing`, that of packed rows and of the images among them; "sdpa" then stands for all of PyTorch's own.

    Raises `UserError` when the wanted one is not installed or does not fit the device, the dtype or packed rows.
    """
    if wanted == "auto":
        usable = FLASH if packing else [name for name in FLASH if name not in _PACKED_ALONE]
        return next((name for name in usable if _obstacle(name, on_cpu, dtype) is None), SDPA)
    if wanted not in (*FLASH, SDPA, "eager"):
        raise UserError(
            f"attn_implementation: {quoted(wanted)} is unknown; auto, sdpa, eager, {', '.join(sorted(FLASH))}"
        )
    if wanted == "eager" and packing:
        raise UserError("attn_implementation: eager cannot keep packed rows apart; leave the key out for auto")
    obstacle = _obstacle(wanted, on_cpu, dtype) if wanted in FLASH else None
    if obstacle:
        raise UserError(f"attn_implementation: {wanted} {obstacle}; leave the key out for auto")
    return wanted


def _obstacle(name: str, on_cpu: bool, dtype: str) -> str | None:
    """Return why a kernel of `FLASH` cannot be used here, None when it can."""
    if not _is_installed(FLASH[name]):
        return f"is not installed (its package is {FLASH[name]})"
    if on_cpu:
        return "runs on CUDA only"
    if dtype == "float32":
        return "takes bfloat16 or float16, not float32"
    if not _runs(name):
        return f"does not run on {torch.cuda.get_device_name()}"
    return None


def has_varlen_kernel(value: torch.Tensor) -> bool:
    """Return whether `varlen_kernel` takes such tensors: half precision, on a GPU that PyTorch's kernel runs on.

    One that is installed beside it has been refused where it does not run.
    """
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and _runs(SDPA, value.device)


def _runs(name: str, device: torch.device | None = None) -> bool:
    return _capability(device) >= _LEAST_CAPABILITY[name]


@functools.cache  # every layer asks in every forward
def _capability(device: torch.device | None) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def varlen_kernel(implementation: str) -> VarlenKernel:
    """Return the kernel that `resolve_attention` chose for packed rows, for half precision on CUDA.

    Raises `UserError` when its package cannot be imported. One that is installed beside PyTorch does so too when it is
    first called and does not compute attention.
    """
    if implementation == SDPA:
        return _from_pytorch()
    try:
        function = _flash_function(implementation)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Built for another PyTorch or CUDA, say.
        raise UserError(
            f"attn_implementation: {implementation} is installed ({FLASH[implementation]}) but cannot be imported:"
            f" {first_line(error)}; fix this, or set attn_implementation: sdpa"
        ) from error
    return CheckedKernel(implementation, _from_flash(function))


def _from_pytorch() -> VarlenKernel:
    # Imported here: it needs a CUDA build of PyTorch.
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Any, k: Any, v: Any, *bounds: Any, scale: float | None, causal: bool) -> torch.Tensor:
        found: Any = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(-1, 0 if causal else -1))
        return found

    return attend  # type: ignore[return-value]


def _from_flash(function: Any) -> VarlenKernel:
    """Call FlashAttention 2, 3 or 4: their argument names agree; some return more than the output."""

    def attend(
        q: Any, k: Any, v: Any, bounds_q: Any, bounds_k: Any, longest_q: int, longest_k: int, scale: Any, causal: bool
    ) -> torch.Tensor:
        found = function(
            q,
            k,
            v,
            cu_seqlens_q=bounds_q,
            cu_seqlens_k=bounds_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found[0] if isinstance(found, tuple) else found

    return attend


def _flash_function(implementation: str) -> Any:
    if implementation == "flash_attention_3":
        from flash_attn_interface import flash_attn_varlen_func
    elif implementation == "flash_attention_2":
        from flash_attn import flash_attn_varlen_func
    else:
        _keep_compiled_kernels()
        from flash_attn.cute import flash_attn_varlen_func
    return flash_attn_varlen_func


def _keep_compiled_kernels() -> None:
    """Make FlashAttention-4 cache its compiled kernels for later runs: each takes some seconds to compile.

    Its own folder would be one in /tmp, where on a shared machine others could have put code for it to load.
    """
    # Told for each kernel, of an argument of its own that is known when it is compiled.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    folder = cache_folder("flash_attention_4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # compiled anew by every run
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
