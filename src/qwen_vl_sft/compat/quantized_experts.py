"""Have transformers and bitsandbytes quantize the experts of a model to 4 bits while it is read, and PEFT adapt them.

transformers 5.23 quantizes linear layers alone: it would leave the experts, nearly all weights of such a model, in 16 bits.
Its loader reads a quantized model tensor by tensor, so the largest that is ever whole is one of a layer's two stacks. Files
that hold it turned are quantized a few experts at a time, so that no turned copy of it is ever there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.compat.experts_in_files import turned_without_copies
from qwen_vl_sft.compat.registry import Patch
from qwen_vl_sft.families.experts import Experts

_METHOD = "bitsandbytes_4bit"
_BLOCK = 64  # weights of one scale
# Weights that are quantized at once.
_AT_ONCE = 2**26


@contextmanager
def quantizing_experts(experts: Experts) -> Iterator[None]:
    """Have `from_pretrained` with bitsandbytes' 4 bits quantize the parameters of experts too."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    original: Any = AUTO_QUANTIZER_MAPPING[_METHOD]

    class Quantize(Bnb4bitQuantize):
        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
            (name, value), *others = input_dict.items()
            if others or not experts.is_weight(name):
                return super().convert(input_dict, **kwargs)
            value = value[0] if isinstance(value, list) else value
            return {name: _quantized(value, self.hf_quantizer.quantization_config)}

    class Quantizer(original):  # type: ignore[misc]
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return experts.is_weight(param_name) or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

    AUTO_QUANTIZER_MAPPING[_METHOD] = Quantizer  # type: ignore[assignment]
    try:
        with turned_without_copies():
            yield
    finally:
        AUTO_QUANTIZER_MAPPING[_METHOD] = original


def _quantized(value: torch.Tensor, settings: Any) -> Any:
    """Quantize experts [E, out, in], which may be turned and not copied, a few at a time: bit for bit as all at once."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    kind, storage = settings.bnb_4bit_quant_type, settings.bnb_4bit_quant_storage
    nested, weights = settings.bnb_4bit_use_double_quant, value[0].numel()
    known = {"compress_statistics": nested, "quant_type": kind, "quant_storage": storage}
    if value.device.type == "meta" or weights % _BLOCK:
        whole: Any = Params4bit(value.contiguous(), requires_grad=False, **known)
        return whole.to(value.device)
    packed = torch.empty(value.numel() // 2 // storage.itemsize, 1, dtype=storage, device=value.device)
    scales, start = [], 0
    for part in value.split(max(1, _AT_ONCE // weights)):
        found, state = quantize_4bit(part.contiguous(), blocksize=_BLOCK, quant_type=kind, quant_storage=storage)
        packed[start : start + len(found)] = found
        scales.append(state.absmax)
        start += len(found)
    nests: dict[str, Any] = {"absmax": torch.cat(scales)}
    if nested:
        nests["offset"] = nests["absmax"].mean()
        nests["absmax"], nests["state2"] = quantize_blockwise(nests["absmax"] - nests["offset"], blocksize=256)
    state = QuantState(
        shape=value.shape,
        dtype=value.dtype,
        blocksize=_BLOCK,
        code=get_4bit_type(kind, device=value.device),
        quant_type=kind,
        **nests,
    )
    return Params4bit(packed, requires_grad=False, quant_state=state, blocksize=_BLOCK, bnb_quantized=True, **known)


def adapt_4bit_experts() -> None:
    """Have PEFT's LoRA on parameters know the shape of those that are in 4 bits, or in FP8 that FSDP2 splits."""
    from peft.tuners.lora.layer import ParamWrapper

    original: Any = ParamWrapper._get_in_out_features
    if hasattr(original, "of_4bit"):
        return

    def features(wrapper: Any, module: nn.Module) -> Any:
        state = getattr(wrapper.get_param(), "quant_state", None)
        if state is None:
            return original(wrapper, module)
        wrapper.num_experts, *sizes = state.shape
        wrapper._param_ndim = len(state.shape)
        return tuple(sizes)

    features.of_4bit = True  # type: ignore[attr-defined]
    ParamWrapper._get_in_out_features = features  # type: ignore[method-assign, assignment]


def _experts_stay() -> bool:
    """Return whether the quantizer leaves a parameter of experts alone."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    model = nn.ModuleDict({"experts": nn.ParameterDict({"down_proj": nn.Parameter(torch.zeros(2, 3, 4))})})
    return not Bnb4BitHfQuantizer.param_needs_quantization(SimpleNamespace(), model, "experts.down_proj")  # type: ignore[arg-type]


def _takes_bytes_for_a_matrix() -> bool:
    """Return whether PEFT takes 4-bit experts for one matrix as wide as its bytes."""
    from peft.tuners.lora.layer import ParamWrapper

    original: Any = ParamWrapper._get_in_out_features
    original = next((cell.cell_contents for cell in original.__closure__ or ()), original)
    packed = SimpleNamespace(shape=torch.Size([12, 1]), quant_state=SimpleNamespace(shape=torch.Size([2, 3, 4])))
    wrapper = SimpleNamespace(get_param=lambda: packed)
    return original(wrapper, nn.Module()) != (3, 4)


PATCHES = (
    Patch(
        name="quantizing_experts",
        package="transformers",
        broken="<=5.23",
        without="A mixture of experts loaded in 4 bits holds its experts, nearly all its weights, in 16 bits.",
        applied_by="compat.quantized_experts.quantizing_experts",
        links=("https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849",),
        still_needed=_experts_stay,
        relies_on={
            "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer.param_needs_quantization": (
                "model",
                "param_name",
            ),
            "transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert": ("input_dict",),
        },
        reads={
            "bitsandbytes.functional.quantize_4bit": (
                "offset = _absmax.mean()",
                "quantize_blockwise(_absmax - offset, blocksize=256)",
            ),
            "transformers.quantizers.auto": ('"bitsandbytes_4bit": ',),
            # It reads one tensor after the other then, and not in threads ahead of what is quantized.
            "transformers.core_model_loading.convert_and_load_state_dict_in_model": ("or has_on_the_fly_quantization",),
        },
    ),
    Patch(
        name="adapt_4bit_experts",
        package="peft",
        broken="<=0.21.2",
        without="LoRA on 4-bit experts takes their bytes for one wide matrix.",
        applied_by="compat.quantized_experts.adapt_4bit_experts",
        still_needed=_takes_bytes_for_a_matrix,
        reads={"peft.tuners.lora.layer.ParamWrapper": ("def _get_in_out_features", "self.num_experts", "_param_ndim")},
    ),
)
