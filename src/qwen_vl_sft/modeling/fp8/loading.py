"""Load a model with FP8 weights: transformers hands over one weight at a time, which is quantized where it is put."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.blocks import FP8BlockLinear
from qwen_vl_sft.modeling.fp8.computation import computation_of
from qwen_vl_sft.modeling.fp8.experts import SCALE, packed_stack
from qwen_vl_sft.modeling.fp8.layers import fp8_layers, is_left_out
from qwen_vl_sft.modeling.fp8.linear import Computation, FP8Linear, packed
from qwen_vl_sft.modeling.fp8.weights import BLOCK, E4M3

METHOD = "qwen_vl_sft_fp8"


class FP8Config(QuantizationConfigMixin):
    """What transformers passes on to the quantizer; all of it can be written as JSON.

    Args:
        settings: the recipe's model keys.
        storage: the type of tensors that hold the bytes.
        on_cpu: the model computes on a CPU.
        official: the `quantization_config` of a checkpoint that holds FP8 weights in blocks; None for one in 16 bits.
    """

    def __init__(
        self,
        settings: ModelSettings,
        storage: torch.dtype = torch.uint8,
        on_cpu: bool = False,
        official: dict[str, Any] | None = None,
    ) -> None:
        self.quant_method: Any = METHOD
        self._settings, self._storage, self._on_cpu, self._official = settings, storage, on_cpu, official

    @property
    def official(self) -> dict[str, Any] | None:
        """Return what a checkpoint says of the FP8 weights that it holds."""
        return self._official

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in a configuration."""
        each = "row" if self._official is None else f"block of {BLOCK} x {BLOCK}"
        return {"quant_method": METHOD, "format": f"e4m3, a scale for each {each}"}

    @property
    def settings(self) -> ModelSettings:
        """Return the recipe's model keys."""
        return self._settings

    @property
    def storage(self) -> torch.dtype:
        """Return the type of tensors that hold the bytes."""
        return self._storage

    @property
    def computation(self) -> Computation:
        """Return how the layers compute."""
        return computation_of(self._settings, self._on_cpu)


class FP8Quantizer(HfQuantizer):
    """Puts FP8 layers in place of linear ones, and fills them while the model is loaded."""

    quantization_config: FP8Config
    serialized_names = {"weight": ["weight", "weight_scale"]}

    @property
    def quantized_element_size(self) -> float:
        """Return the bytes of a weight."""
        return 1.0

    @property
    def is_trainable(self) -> bool:
        """Return that adapters train on it."""
        return True

    def is_serializable(self) -> bool:
        """Return that the model is not saved so."""
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight is one of an FP8 layer, or of experts."""
        path, _, name = param_name.rpartition(".")
        experts = family_of(model.config).experts
        if experts is not None and experts.is_weight(param_name):
            return True
        return name == "weight" and isinstance(model.get_submodule(path), FP8Linear)

    def get_quantize_ops(self) -> Any:
        """Return what quantizes a weight."""
        from transformers.core_model_loading import ConversionOps

        storage, official = self.quantization_config.storage, self.quantization_config.official is not None
        computation = self.quantization_config.computation

        class Quantize(ConversionOps):
            def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
                found: dict[str, Any] = {}
                for name, value in input_dict.items():
                    given = value[0] if isinstance(value, list) else value
                    if given.ndim == 3:
                        found[name], found[name + SCALE] = packed_stack(given, computation, storage)
                        continue
                    if official:
                        # Given in the type of the other weights, which holds every number of e4m3.
                        same = given.to(E4M3).view(torch.uint8).view(storage)
                        found[name] = nn.Parameter(same, requires_grad=False)
                        continue
                    weight, scale = packed(given, storage)
                    found[name] = nn.Parameter(weight, requires_grad=False)
                    found[f"{name}_scale"] = scale
                return found

        return Quantize()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        computation = config.computation
        kind = FP8Linear if config.official is None else FP8BlockLinear
        for name, layer in fp8_layers(model, config.settings).items():
            if config.official is not None and is_left_out(name, config.official):
                continue
            with torch.device("meta"):
                made = kind(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    computation,
                    layer.weight.dtype,
                    config.storage,
                )
            model.set_submodule(name, made)
        experts = family_of(model.config).experts
        for module in experts.modules(model).values() if experts else ():
            for weight in experts.weights:  # type: ignore[union-attr]
                rows = getattr(module, weight).shape[:2]
                module.register_buffer(weight + SCALE, torch.empty(*rows, 4, dtype=torch.uint8, device="meta"))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, FP8BlockLinear):
                module.finish()
        return model


# Not through transformers' decorators: they refuse a name that they know, and so a module that is imported again.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FP8Config
AUTO_QUANTIZER_MAPPING[METHOD] = FP8Quantizer
