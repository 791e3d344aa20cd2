"""Put fused kernels in place of chains of small operations, each on its own switch.

liger-kernel's own patch of Qwen2-VL does not import with transformers 5.23 (it looks for an output class that is gone),
so its single kernels are put in here.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_vl_sft.errors import shortened
from qwen_vl_sft.families.base import RopeFunctions
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling import linear_attention
from qwen_vl_sft.modeling.experts import compute_fused
from qwen_vl_sft.modeling.fp8.fused import hands_on_fp8
from qwen_vl_sft.modeling.fp8.linear import INPUTS, LowerProduct
from qwen_vl_sft.modeling.lora_product import adapted, fits
from qwen_vl_sft.modeling.rope_check import first_values_rotated

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

LORA = "lora"
KERNELS = {
    "rms_norm": "normalisation in the language model",
    "swiglu": "activation in the language model",
    "rope": "rotary embedding in the language model and the vision tower",
    "quick_gelu": "activation in the vision tower",
    "experts": "what stands around the products of a mixture of experts",
    "patch_embed": "the vision tower's first layer, as a matrix product",
    linear_attention.NAME: "gated delta rule, convolution and norm of linear attention",
    LORA: "the adapter's products, added to the output and to the gradient of the input",
}
FROM_LIGER = ("rms_norm", "swiglu", "rope")
PLAIN_PYTORCH = ("patch_embed", LORA)
# What "auto" leaves out: on an H200 steps of Qwen3-VL-30B-A3B were faster without (docs/families.md).
ASKED_FOR = frozenset({"experts"})
# Set while an attention layer computes that has the kernel.
_ROTATES_FUSED: ContextVar[bool] = ContextVar("rotates_fused", default=False)


def chosen_kernels(wanted: str | list[str] | None, on_cpu: bool) -> list[str]:
    """Return the kernels that a recipe names; for "auto" those that pay and can be used here.

    What can be used is a matter of the device and of what is installed.
    """
    if wanted != "auto":
        return list(wanted or ())
    if on_cpu:
        return list(PLAIN_PYTORCH)
    missing = {*ASKED_FOR, *(() if _has_liger() else FROM_LIGER)}
    if linear_attention.obstacle():
        missing.add(linear_attention.NAME)
    return [name for name in KERNELS if name not in missing]


def problems_of_kernels(wanted: list[str], on_cpu: bool) -> Iterator[str]:
    """Yield why these kernels cannot be used; nothing when they can."""
    unknown = [name for name in wanted if name not in KERNELS]
    compiled = [name for name in wanted if name not in PLAIN_PYTORCH]
    if unknown:
        yield f"fused_kernels: {shortened(', '.join(unknown))} is unknown; known are {', '.join(KERNELS)}"
    elif compiled and on_cpu:
        yield f"fused_kernels: {', '.join(compiled)} run on CUDA only; leave them out on a CPU"
    elif set(wanted) & set(FROM_LIGER) and not _has_liger():
        yield (
            f"fused_kernels: {', '.join(FROM_LIGER)} need liger-kernel; pip install 'qwen_vl_sft[kernels]', or leave"
            " them out"
        )
    elif linear_attention.NAME in wanted and (reason := linear_attention.obstacle()):
        yield f"fused_kernels: {linear_attention.NAME} does not run here: {reason}; or leave it out"


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def use_fused_kernels(model: nn.Module, wanted: list[str]) -> dict[str, int]:
    """Put the kernels into a base model, where its family says that they fit; return how many layers have each.

    `lora` needs a model with its adapter: `use_fused_lora` puts that in. PEFT copies layers that train in full: what is
    put in here belongs to the layer that it is called on, as a bound method does and a closure over a layer does not.
    Layers that hand FP8 values on have kernels of their own.
    """
    family = family_of(model.config)
    fitting = [name for name in wanted if name in family.fused_layers and name not in family.unfit_kernels]
    counts = {name: 0 for name in wanted if name != LORA}
    for name, module in model.named_modules():
        part = family.part_of(name)
        if hands_on_fp8(module):
            continue
        for kernel in fitting:
            if family.fused_layers[kernel].holds(name, part, module):
                module.forward = _FORWARDS[kernel](module)
                counts[kernel] += 1
    if "rope" in fitting:
        _offer_fused_rope(sys.modules[type(model).__module__], family.rope_functions)
    return counts


def use_fused_lora(model: nn.Module) -> int:
    """Have the layers of a model with an adapter add the adapter's part in one call; return how many do."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        fused = functools.wraps(layer.forward)(functools.partial(_lora, layer, layer.forward))
        layer.forward = fused  # type: ignore[method-assign]
    return len(layers)


def compute_adapters_in(model: nn.Module, dtype: torch.dtype) -> int:
    """Have the adapters of a model that answers compute in half precision, as under autocast; return how many layers do.

    PEFT holds them in float32, and converts the widest activations of each layer to it.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            for weights in (module.lora_A, module.lora_B):
                weights.to(dtype)
    return use_fused_lora(model)


def _rms_norm(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama": computed in float32 and rounded before the weight is multiplied, as transformers does. Not in place: the
    # gradient that comes in is also that of the residual.
    return LigerRMSNormFunction.apply(hidden_states, layer.weight, layer.variance_epsilon, 0.0, "llama", False)


def _offset_norm(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute a norm that multiplies by weight + 1, all of it in float32, as Qwen3.5's are."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, layer.weight, layer.eps, 1.0, "gemma", False)


def _swiglu(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return layer.down_proj(LigerSiLUMulFunction.apply(layer.gate_proj(hidden_states), layer.up_proj(hidden_states)))


@functools.cache
def _compiled_quick_gelu() -> Any:
    # Written out, it reads and writes the widest activations of the tower three times.
    return _compiled(lambda hidden_states: hidden_states * torch.sigmoid(1.702 * hidden_states))


def _quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    if _without_gradients(hidden_states):
        from qwen_vl_sft.modeling.vision_kernels import quick_gelu

        return quick_gelu(hidden_states)
    activated: torch.Tensor = _compiled_quick_gelu()(hidden_states)
    return activated


def _without_gradients(tensor: torch.Tensor) -> bool:
    """Return whether a kernel of the GPU that gives no gradients is enough."""
    return tensor.is_cuda and not (torch.is_grad_enabled() and tensor.requires_grad)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called, for any sizes."""
    from torch._inductor import config

    # Otherwise every process starts one more per core, each importing PyTorch, to compile a few lines.
    config.compile_threads = 1
    return torch.compile(function, dynamic=True)


def _patch_embed(layer: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """Embed patches [N, channels, time, height, width], each as large as the kernel -> [N, values, 1, 1, 1].

    cuDNN has no fast convolution in bfloat16 for a kernel that is never moved.
    """
    embedded = nn.functional.linear(patches.flatten(1), layer.weight.flatten(1), layer.bias)
    return embedded[:, :, None, None, None]


def _is_plain(layer: LoraLayer) -> bool:
    """Return whether an adapter adds scaling * B A x to the output of a linear layer, and nothing else."""
    is_linear = isinstance(layer.get_base_layer(), nn.Linear)
    return is_linear and not layer.lora_variant and not any(layer.lora_bias.values())


def _lora(
    layer: Any, otherwise: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Compute a layer with one adapter, `x` [..., in] -> [..., out]; call `otherwise` for all else.

    PEFT copies the layer's output, scales the product and adds both: each a pass over the widest activations. Here the
    matrix product adds to the output, which is rounded once and not three times; and to the gradient of the input too
    where the layer is a plain one.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or args or kwargs:
        return otherwise(x, *args, **kwargs)
    (adapter,) = active
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    # ZeRO-3 gathers weights for the layers that are called.
    split = hasattr(up.weight, "ds_id")
    if split or not (torch.is_autocast_enabled(x.device.type) or x.dtype == down.weight.dtype):
        return otherwise(x)
    dropped, base = layer.lora_dropout[adapter](x), layer.base_layer
    if dropped is x and torch.is_grad_enabled() and fits(base, x):
        return adapted(base, x, down.weight, up.weight, layer.scaling[adapter])
    result = base(x)
    normed = INPUTS.norm_of(dropped)
    reduced = down(dropped) if normed is None else LowerProduct.apply(dropped, down.weight, *normed)
    product = torch.addmm(result.flatten(0, -2), reduced.flatten(0, -2), up.weight.t(), alpha=layer.scaling[adapter])
    return product.view_as(result)


def _attend(layer: Any, *args: Any, **kwargs: Any) -> Any:
    token = _ROTATES_FUSED.set(True)
    try:
        return type(layer).forward(layer, *args, **kwargs)
    finally:
        _ROTATES_FUSED.reset(token)


def _offer_fused_rope(modeling: Any, functions: RopeFunctions) -> None:
    """Have the functions that attention layers call choose: all models of a family share them."""
    for name in (functions.language, functions.vision):
        original = getattr(modeling, name)
        if not hasattr(original, "without_kernel"):
            # liger's kernel works in place, on what the vision tower would first have to copy.
            text_rope = _text_rope if functions.whole_heads else first_values_rotated(original)
            fused = text_rope if name == functions.language else _vision_rope(_compiled(original))
            setattr(modeling, name, _fused_or_not(fused, original))


def _fused_or_not(fused: Any, original: Any) -> Any:
    @functools.wraps(original)
    def choose(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return (fused if _ROTATES_FUSED.get() and query.is_cuda else original)(query, key, cos, sin)

    choose.without_kernel = original  # type: ignore[attr-defined]
    choose.kernel = fused  # type: ignore[attr-defined]
    return choose


def _vision_rope(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def rotate_all(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        if query.dim() == 3 and _without_gradients(query):
            from qwen_vl_sft.modeling.vision_kernels import rotate

            return rotate(query, key, cos, sin)
        return compiled(query, key, cos, sin)

    return rotate_all


def _text_rope(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """Rotate [B, heads, T, D] by `cos`, `sin` [B, T, D], whose halves are equal, also with M-RoPE's sections."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)


# Makes the forward of a layer that a kernel replaces.
_FORWARDS: dict[str, Callable[[Any], Any]] = {
    "rms_norm": lambda layer: types.MethodType(
        _rms_norm if hasattr(layer, "variance_epsilon") else _offset_norm, layer
    ),
    "swiglu": lambda layer: types.MethodType(_swiglu, layer),
    "rope": lambda layer: types.MethodType(_attend, layer),
    "quick_gelu": lambda layer: _quick_gelu,
    "patch_embed": lambda layer: types.MethodType(_patch_embed, layer),
    "experts": lambda layer: types.MethodType(compute_fused, layer),
    linear_attention.NAME: linear_attention.kernel_forward,
}
