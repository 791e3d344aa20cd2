"""Choose how FP8 layers compute from a recipe: the kernels, and whether the products are emulated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import shortened
from qwen_vl_sft.modeling.fp8.fused import use_fp8_kernels
from qwen_vl_sft.modeling.fp8.linear import Computation
from qwen_vl_sft.modeling.fp8.products import problem_of_device
from qwen_vl_sft.modeling.fp8.projections import join_projections

EMULATION: Final = "emulation"
KERNELS = {
    "quantize": "scale and values of a row in one pass",
    "transpose": "a weight, for the gradient of its input",
    "rms_norm": "normalisation that quantizes its output",
    "projections": "q, k and v as one function, with one product for the gradient of their input",
    "mlp": "gate, up, activation and down with everything between the products in one pass each way",
}


# Those that layers in 16 bits have a use for, whose gradients are FP8 products.
OF_GRADIENTS = ("quantize", "transpose")


def chosen_fp8_kernels(settings: ModelSettings, on_cpu: bool) -> list[str]:
    """Return the kernels that FP8 layers use: those that the recipe names; for "auto" all, where they run."""
    fp8 = settings.load_in_fp8 or settings.fp8_gradients
    if not fp8 or settings.fp8_kernels == "auto":
        runs = fp8 and fp8 != EMULATION and not on_cpu
        return _known_kernels(settings) if runs else []
    return list(settings.fp8_kernels or ())


def _known_kernels(settings: ModelSettings) -> list[str]:
    return list(KERNELS if settings.load_in_fp8 else OF_GRADIENTS)


def problems_of_fp8_kernels(settings: ModelSettings, on_cpu: bool) -> Iterator[str]:
    """Yield why the kernels that a recipe names cannot be used."""
    wanted = chosen_fp8_kernels(settings, on_cpu)
    known = _known_kernels(settings)
    unknown = [name for name in wanted if name not in known]
    if unknown and set(unknown) <= set(KERNELS):
        yield f"fp8_kernels: {', '.join(unknown)} work with load_in_fp8 alone; fp8_gradients has {', '.join(known)}"
    elif unknown:
        yield f"fp8_kernels: {shortened(', '.join(unknown))} is unknown; known are {', '.join(known)}"
    elif wanted and on_cpu:
        yield f"fp8_kernels: {', '.join(wanted)} run on CUDA only; leave the key out on a CPU"
    elif not (settings.fp8_forward and settings.fp8_backward) and isinstance(settings.fp8_kernels, list):
        for name in sorted({"projections", "mlp"}.intersection(wanted)):
            way_out = "leave it out, or set fp8_forward and fp8_backward"
            yield f"fp8_kernels: {name} computes both directions in FP8; {way_out}"


def problem_of_fp8(settings: ModelSettings, on_cpu: bool) -> str | None:
    """Return why the recipe's FP8 cannot be computed on this device, with the way out."""
    key = "load_in_fp8" if settings.load_in_fp8 else "fp8_gradients"
    if not getattr(settings, key) or getattr(settings, key) == EMULATION:
        return None
    problem = problem_of_device(on_cpu)
    way_out = "use load_in_4bit, or a base in 16 bits (load_in_fp8: false)" if settings.load_in_fp8 else "leave it out"
    return problem and f"{key}: {problem}; {way_out}"


def computation_of(settings: ModelSettings, on_cpu: bool) -> Computation:
    """Return how the layers of a recipe compute."""
    forward, backward = settings.fp8_forward, settings.fp8_backward
    plain = Computation(forward, backward, EMULATION in (settings.load_in_fp8, settings.fp8_gradients))
    wanted = chosen_fp8_kernels(settings, on_cpu)
    if not wanted:
        return plain
    from qwen_vl_sft.modeling.fp8.checked import CheckedKernels

    kernels = CheckedKernels()
    return Computation(
        forward,
        backward,
        plain.emulated,
        kernels.quantize_rows if "quantize" in wanted else plain.quantize,
        kernels.transpose if "transpose" in wanted else plain.transpose,
    )


def join_chosen_projections(model: nn.Module, settings: ModelSettings, on_cpu: bool) -> int:
    """Have q, k and v of a model with its adapter compute together where a recipe chooses it; return how many layers do."""
    if "projections" not in chosen_fp8_kernels(settings, on_cpu):
        return 0
    from qwen_vl_sft.modeling.fp8.checked import CheckedKernels

    return join_projections(model, CheckedKernels())


def use_chosen_fp8_kernels(model: nn.Module, settings: ModelSettings, on_cpu: bool) -> dict[str, int]:
    """Put the norms and MLPs that a recipe chooses into a model with FP8 layers; return how many have each."""
    wanted = [name for name in chosen_fp8_kernels(settings, on_cpu) if name in ("rms_norm", "mlp")]
    if not wanted:
        return {}
    from qwen_vl_sft.modeling.fp8.checked import CheckedKernels

    return use_fp8_kernels(model, wanted, CheckedKernels())
