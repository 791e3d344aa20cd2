"""Compute experts whose weights are in 4 bits or FP8, or that each have an adapter: in groups, as transformers does.

transformers multiplies the tokens of all experts of a layer in one grouped product. Here the weights of that product are
made from their 4 bits just before, again for the gradient, and never kept, or are FP8 themselves; and an adapter adds two
narrow products to it, where PEFT would form B A of all experts in every forward and its gradient in every backward. What
stands around the products (`token_routes`) is computed by kernels where the recipe takes them.

Adapters are PEFT's own for `target_parameters`: a `ParamWrapper` around the experts for each parameter, with all A in one
matrix [E r, in], expert by expert, and all B in one [out, r E], rank by rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import _grouped_linear

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.experts import FP8Stack, expert_product, selected_rows
from qwen_vl_sft.modeling.fp8.linear import computed_type
from qwen_vl_sft.modeling.fp8.weights import Quantized
from qwen_vl_sft.modeling.token_routes import Checked, Gated, Gather, Plain, Route, Spread, route

# Strides of a grouped product on a GPU are multiples of so many bytes.
_ALIGNED = 16
_PLAIN, _FUSED = Plain(), Checked()


def use_quantized_experts(model: Any, key: str) -> int:
    """Have the layers of a loaded model multiply with experts in 4 bits or FP8; return how many have some.

    Raises `UserError` where `key` asked for these and a layer's experts are not in them.
    """
    experts = family_of(model.config).experts
    assert experts is not None, "a model without experts"
    modules = experts.modules(model)
    for name, module in modules.items():
        states: dict[str, Any] = {
            weight: getattr(getattr(module, weight), "quant_state", None) for weight in experts.weights
        }
        unquantized = [weight for weight, state in states.items() if state is None]
        if unquantized:
            raise UserError(
                f"{key}: {name}.{unquantized[0]} could not be quantized; set {key}: false, or name a model whose experts"
                " are in the form that its family has"
            )
        # Where a strategy gathers split weights, what they are becomes no parameter of bitsandbytes again.
        module.quant_states = states
        module.forward = MethodType(_plain, module)
    return len(modules)


def use_grouped_lora(model: nn.Module) -> int:
    """Have the layers of a model with an adapter on its experts multiply with it in groups; return how many do."""
    from peft.tuners.lora import ParamWrapper

    inner = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    outer = [module for module in model.modules() if isinstance(module, ParamWrapper) and id(module) not in inner]
    for module in outer:
        module.forward = MethodType(_adapted, module)  # type: ignore[method-assign]
    return len(outer)


def check_adapted(model: Any) -> int:
    """Check that every expert of every layer has its adapter, and that it trains; return how many experts there are.

    PEFT only warns when it finds no parameter to adapt. Raises `UserError`.
    """
    experts = family_of(model.config).experts
    assert experts is not None, "a model without experts"
    layers = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{experts.path}")}
    assert layers, "a model without experts"
    count = model.config.get_text_config().num_experts
    for name, module in layers.items():
        found = _wrappers(module)
        for weight in experts.weights:
            wrapper = found.get(weight)
            pairs = [] if wrapper is None else [(wrapper.lora_A[key], wrapper.lora_B[key]) for key in wrapper.lora_A]
            if not pairs or wrapper is None or wrapper.num_experts != count:
                raise UserError(f"lora_scope: experts: {name}.{weight} has no adapter for each of its {count} experts")
            if not all(layer.weight.requires_grad for pair in pairs for layer in pair):
                raise UserError(f"lora_scope: experts: the adapter of {name}.{weight} does not train")
    return count * len(layers)


def compute_fused(
    experts: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer's experts with the kernels around their products; see `_compute`."""
    return _compute(experts, hidden_states, chosen, weights, {}, fused=True)


def _plain(experts: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _compute(experts, hidden_states, chosen, weights, {})


def _adapted(outermost: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    wrappers, experts = _wrappers(outermost), outermost.get_base_layer()
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for name, wrapper in wrappers.items():
        active = [] if wrapper.disable_adapters or wrapper.merged else wrapper.active_adapters
        pairs[name] = [_pair(wrapper, adapter) for adapter in active if adapter in wrapper.lora_A]
    # What computes the experts without their adapter.
    fused = getattr(experts.forward, "__func__", None) is compute_fused
    return _compute(experts, hidden_states, chosen, weights, pairs, fused)


def _wrappers(module: Any) -> dict[str, Any]:
    """Return PEFT's wrappers around a layer's experts, by the parameter that each adapts."""
    found = {}
    while hasattr(module, "parameter_name"):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def _pair(wrapper: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A [E, r, in], B [E, out, r] and their scaling."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.view(wrapper.num_experts, -1, a.shape[-1])
    return a, b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1), wrapper.scaling[adapter]


def _compute(
    experts: Any,
    hidden_states: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    pairs: Mapping[str, list[tuple[torch.Tensor, torch.Tensor, float]]],
    fused: bool = False,
) -> torch.Tensor:
    """Compute tokens [T, H] with the experts chosen for each [T, k], weighed [T, k] -> [T, H]."""
    way, kernels = route(chosen, experts.num_experts), _FUSED if fused else _PLAIN
    selected = Spread.apply(hidden_states, way, kernels)
    state = getattr(experts, "quant_states", {}).get("gate_up_proj")
    # A token is quantized once, for all experts that it goes to.
    known = selected_rows(hidden_states, way.tokens, state.computation) if isinstance(state, FP8Stack) else None
    widened = _project(experts, "gate_up_proj", selected, way, pairs, known)
    weighed = weights.flatten().index_select(0, way.order)
    activated = Gated.apply(widened, weighed, kernels) if fused else experts._apply_gate(widened) * weighed[:, None]
    projected = _project(experts, "down_proj", activated, way, pairs)
    return Gather.apply(projected, way, kernels).to(hidden_states.dtype)


def _project(
    experts: Any,
    name: str,
    inputs: torch.Tensor,
    way: Route,
    pairs: Mapping[str, Any],
    known: Quantized | None = None,
) -> Any:
    """Multiply inputs [S, in], sorted by expert, with a parameter [E, out, in] and its adapters -> [S, out].

    `known` is the quantized form of the inputs, for experts in FP8.
    """
    weight, state = getattr(experts, name), getattr(experts, "quant_states", {}).get(name)
    if state is None:
        inputs = inputs.to(weight.dtype)
        found = grouped(inputs, weight, way.ends)
    elif isinstance(state, FP8Stack):
        inputs = inputs.to(computed_type(inputs))
        found = expert_product(experts, name, state, inputs, way.ends, known)
    else:
        inputs = inputs.to(state.dtype)
        found = _Unpacked.apply(inputs, weight, state, way.ends)
    for a, b, scaling in pairs.get(name, ()):
        a, b = _aligned(a.to(inputs.dtype), b.to(inputs.dtype))
        found = found + grouped(grouped(inputs, a, way.ends) * scaling, b, way.ends)
    return found


def grouped(inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each run of inputs [S, in] that ends at `ends` [E] with its own matrix of [E, out, in] -> [S, out]."""
    if inputs.dtype != torch.float64:
        return _grouped_linear(inputs, weight, ends)
    # Grouped products have no float64.
    begins = [0, *ends.tolist()]
    return torch.cat([inputs[begins[n] : begins[n + 1]] @ weight[n].T for n in range(len(weight))])


class _Unpacked(torch.autograd.Function):
    """A grouped product with frozen 4-bit weights, which are unpacked for it and again for the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, state: Any, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed, ends)
        ctx.state = state
        return grouped(inputs, unpacked(packed, state), ends)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        packed, ends = ctx.saved_tensors
        weight = unpacked(packed, ctx.state)
        return grouped(gradients[0].to(weight.dtype), weight.transpose(-1, -2), ends), None, None, None


def unpacked(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weights of 4-bit experts [E, out, in], in the precision that they were quantized from."""
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        return dequantize_4bit(packed.detach().view(torch.uint8), state)


def _aligned(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the rank of A [E, r, in] and B [E, out, r] up with zeros, where a GPU's grouped product needs it wider."""
    ranks = _ALIGNED // a.element_size()
    missing = -a.shape[1] % ranks
    if not missing or a.device.type == "cpu":
        return a, b.contiguous()
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
