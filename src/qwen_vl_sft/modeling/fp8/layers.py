"""Which layers of a model hold FP8 weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.fp8.weights import BLOCK, fits


def fp8_layers(model: nn.Module, settings: ModelSettings) -> dict[str, nn.Linear]:
    """Return the layers of a 16-bit model that hold FP8 weights under these settings, by name.

    Those are the linear layers of the language model and of the modules that `fp8_modules` names, but for what a family
    keeps in 16 bits and for sizes that products in FP8 do not take.
    """
    family = family_of(model.config)  # type: ignore[arg-type]
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and is_fp8(name, layer, family, settings)
    }


def is_fp8(name: str, layer: nn.Linear, family: ModelFamily, settings: ModelSettings) -> bool:
    """Return whether a linear layer of a model holds FP8 weights."""
    asked = any(is_inside(name, path) for path in settings.fp8_modules or ())
    wanted = asked or family.part_of(name) == "language"
    return wanted and not family.stays_16bit(name) and fits(layer.out_features, layer.in_features)


def official_problem(stored: Any, settings: ModelSettings) -> str | None:
    """Return why FP8 weights of a checkpoint cannot be taken as they are, by its `quantization_config`; None if they can."""
    kind = stored.get("quant_method", "quantization_config")
    if kind != "fp8":
        return f"holds weights that are quantized already ({kind})"
    size, scheme, scales = (stored.get(key) for key in ("weight_block_size", "activation_scheme", "scale_fmt"))
    if size is None or list(size) != [BLOCK, BLOCK] or scheme not in (None, "dynamic") or scales not in (None, "float"):
        return f"holds FP8 weights in another form than blocks of {BLOCK} x {BLOCK} with scales of inputs as they come"
    if not settings.load_in_fp8:
        return "holds FP8 weights"
    return None


def is_left_out(name: str, stored: Any) -> bool:
    """Return whether a checkpoint of FP8 weights keeps a module in 16 bits, by its `quantization_config`."""
    kept = stored.get("modules_to_not_convert") or stored.get("ignored_layers") or ()
    return any(is_inside(name, path.removeprefix("model.")) for path in kept)


def is_inside(name: str, path: str) -> bool:
    """Return whether a module lies in another, or is it."""
    return f".{path}." in f".{name}."
