"""Load the base model and its processor, quantized or not, and count and freeze its parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from qwen_vl_sft.compat.experts_in_files import read_by_whole_shapes, write_as_read
from qwen_vl_sft.compat.for_bitsandbytes import keep_4bit_weights_unpacked, unpack_rows_by_blocks
from qwen_vl_sft.compat.for_transformers import compute_linear_attention_on_cpu, forget_unused_renamings
from qwen_vl_sft.compat.quantized_experts import adapt_4bit_experts, quantizing_experts
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.families.base import PARTS, ModelFamily
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.attention import use_segmented_vision_attention
from qwen_vl_sft.modeling.attention_kernels import SDPA, resolve_attention
from qwen_vl_sft.modeling.experts import use_quantized_experts
from qwen_vl_sft.modeling.fp8.computation import use_chosen_fp8_kernels
from qwen_vl_sft.modeling.fp8.experts import FP8Stack
from qwen_vl_sft.modeling.fp8.layers import official_problem
from qwen_vl_sft.modeling.fp8.linear import FP8Linear
from qwen_vl_sft.modeling.fp8.loading import FP8Config
from qwen_vl_sft.modeling.loaded_weights import CHECKED, check_loaded


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    total: int = 0
    trainable: int = 0


def load_processor(settings: ModelSettings, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """Load the model's processor with the recipe's pixel limits, which are saved with it and so hold everywhere after."""
    config = load_config(settings)
    processor = _from_hub(AutoProcessor, settings)
    check_chat_template(processor, f"model_name_or_path: {settings.model_name_or_path}")
    template, adapt = processor.chat_template, family_of(config).adapt_template
    processor.chat_template = (
        {name: adapt(text) for name, text in template.items()} if isinstance(template, dict) else adapt(template)
    )
    set_pixel_limits(processor, min_pixels, max_pixels)
    if len(processor.tokenizer) > config.get_text_config().vocab_size:
        raise UserError(
            f"model {settings.model_name_or_path}: its tokenizer has {len(processor.tokenizer)} tokens but the model only"
            f" {config.get_text_config().vocab_size}; the folder mixes two models"
        )
    return processor


def check_chat_template(processor: Any, where: str) -> None:
    """Raise `UserError` for a processor that has no chat template, which older trainers did not save with it."""
    template = processor.chat_template
    if not template or (isinstance(template, dict) and "default" not in template):
        raise UserError(
            f"{where} has no chat template, so no prompt can be made; copy chat_template.jinja into it from the model that"
            " it was made from"
        )


def set_pixel_limits(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Change the limits that are given. Raises `UserError` if the lower is then above the upper."""
    size = processor.image_processor.size
    shortest, longest = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if shortest > longest:
        raise UserError(f"min_pixels {shortest:,} is above max_pixels {longest:,}; set both, or neither")
    # The names that transformers 5 reads; `min_pixels` and `max_pixels` attributes are ignored there
    # (https://github.com/huggingface/transformers/issues/41955).
    processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}


def load_family(settings: ModelSettings) -> ModelFamily:
    """Return the family of a recipe's model. Raises `UserError` as `load_config` does."""
    return family_of(load_config(settings))


def load_config(settings: ModelSettings) -> Any:
    """Load the model's configuration. Raises `UserError` for a model outside the Qwen-VL family, or of quantized weights."""
    config = _from_hub(AutoConfig, settings)
    family_of(config, f"model_name_or_path: {settings.model_name_or_path}")
    # transformers would take this over the recipe's own quantization, or load the numbers as if they were weights.
    stored = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if stored and (problem := official_problem(_as_dict(stored), settings)):
        way_out = "name the 16-bit model that it was made from (load_in_4bit quantizes it on loading)"
        if problem == "holds FP8 weights":
            way_out = f"set load_in_fp8: true to train on them as they are, or {way_out}"
        raise UserError(f"model_name_or_path: {settings.model_name_or_path} {problem}; {way_out}")
    if stored and family_of(config).experts:
        raise UserError(
            f"model_name_or_path: {settings.model_name_or_path} holds experts in FP8, which are not taken as they are; name"
            f" the 16-bit model that it was made from (load_in_fp8 quantizes it on loading)"
        )
    return config


def without_quantization(config: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return a configuration without its `quantization_config`, which transformers would follow, and that one."""
    stored = None
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None):
            stored = _as_dict(part.quantization_config)
            del part.quantization_config
    return config, stored


def _as_dict(stored: Any) -> dict[str, Any]:
    return stored if isinstance(stored, dict) else dict(stored.to_dict())


def load_model(
    settings: ModelSettings,
    on_cpu: bool,
    local_rank: int = 0,
    strategy: str = "single",
    computed_in: torch.dtype | None = None,
) -> Any:
    """Load the base model, ready for an adapter or for training in full. Raises `UserError` when its files hold another one.

    Args:
        settings: the recipe's model keys.
        on_cpu: compute on the CPU.
        local_rank: the GPU to load onto.
        strategy: how the run is launched. ZeRO-3 and FSDP2 place the weights themselves.
        computed_in: what FSDP2 turns weights of floats into before it computes; None leaves them as they are.
    """
    family = load_family(settings)
    attention = resolve_attention(settings.attn_implementation, on_cpu, settings.dtype)
    dtype = getattr(torch, settings.dtype)
    # FSDP2 splits tensors of floats alone, and would round quantized values that lie in another type than it computes in.
    storage = (computed_in or dtype) if strategy == "fsdp2" else torch.uint8
    config, official = without_quantization(load_config(settings))
    quantization = (
        FP8Config(settings, storage, on_cpu, official)
        if settings.load_in_fp8
        else quantization_config(settings, family, storage)
    )
    if family.experts:
        read_by_whole_shapes()
    quantizes = quantizing_experts(family.experts) if family.experts and settings.load_in_4bit else nullcontext()
    with quantizes:
        model, loading = _from_hub(
            AutoModelForImageTextToText,
            settings,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=settings.use_safetensors,
            config=config,
            quantization_config=quantization,
            device_map=None if on_cpu or strategy in ("zero3", "fsdp2") else {"": local_rank},
            **CHECKED,
        )
    check_loaded(loading, f"model_name_or_path: {settings.model_name_or_path}")
    compute_linear_attention_on_cpu(model)
    if family.experts:
        write_as_read(model)
    if family.experts and (settings.load_in_4bit or settings.load_in_fp8):
        use_quantized_experts(model, "load_in_4bit" if settings.load_in_4bit else "load_in_fp8")
        adapt_4bit_experts()
    if attention == SDPA:
        # This package's kernel for images, unless PyTorch's was asked for.
        use_segmented_vision_attention(model, own=settings.attn_implementation == "auto" and not on_cpu)
    if on_cpu and settings.load_in_4bit:
        keep_4bit_weights_unpacked(model)
        unpack_rows_by_blocks()
    if settings.load_in_fp8:
        use_chosen_fp8_kernels(model, settings, on_cpu)
    if strategy == "zero3":
        forget_unused_renamings(model)
    return model


def build_on_meta(settings: ModelSettings) -> Any:
    """Build the model's structure without weights, for counting and for finding layers before anything is loaded."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(load_config(settings))


def quantization_config(
    settings: ModelSettings, family: ModelFamily, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' settings for the recipe's model keys, None when nothing is quantized.

    `storage` is the type of the tensors that hold the 4-bit values, which makes no difference to them.
    """
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(family.keep_16bit))
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(family.keep_16bit),
    )


def count_parameters(model: nn.Module) -> dict[str, PartCount]:
    """Count the parameters of each part; a packed 4-bit or FP8 weight counts as the weights it holds."""
    counts, family = {part: [0, 0] for part in PARTS}, family_of(model.config)
    fp8 = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    fp8 |= {name for name, p in model.named_parameters() if isinstance(getattr(p, "quant_state", None), FP8Stack)}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if name in fp8:
            size *= parameter.element_size()
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()
        counts[family.part_of(name)][0] += size
        counts[family.part_of(name)][1] += size if parameter.requires_grad else 0
    return {part: PartCount(*count) for part, count in counts.items()}


def format_parameters(counts: dict[str, PartCount]) -> str:
    """Return a table of parameters per part, at most 60 columns wide."""
    lines = [f"{'part':<10}{'parameters':>16}{'trainable':>16}{'share':>10}"]
    total = PartCount(*(sum(getattr(count, name) for count in counts.values()) for name in ("total", "trainable")))
    for part, count in {**counts, "all": total}.items():
        share = count.trainable / count.total if count.total else 0
        lines.append(f"{part:<10}{count.total:>16,}{count.trainable:>16,}{share:>10.4%}")
    return "\n".join(lines)


def freeze_for_full_training(model: nn.Module, settings: ModelSettings) -> None:
    """Freeze what a recipe leaves alone in full fine-tuning."""
    if settings.freeze_vision_tower:
        freeze_vision_tower(model)
    if not settings.train_router:
        freeze_routers(model)


def freeze_vision_tower(model: nn.Module) -> None:
    """Freeze the vision tower in full fine-tuning; the merger behind it stays trainable."""
    family = family_of(model.config)
    for name, parameter in model.named_parameters():
        if family.part_of(name) == "vision":
            parameter.requires_grad_(False)


def freeze_routers(model: nn.Module) -> None:
    """Freeze what chooses the experts of a token, where a model has experts."""
    experts = family_of(model.config).experts
    for name, parameter in model.named_parameters():
        if experts and experts.is_router(name):
            parameter.requires_grad_(False)


def trained_parts(model: nn.Module) -> set[str]:
    """Return the `PARTS` that have trainable weights."""
    family = family_of(model.config)
    return {family.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_vision_frozen(model: nn.Module) -> bool:
    """Return whether nothing in the vision tower or its mergers trains."""
    return trained_parts(model) <= {"language"}


def _from_hub(factory: Any, settings: ModelSettings, **arguments: Any) -> Any:
    try:
        return factory.from_pretrained(
            settings.model_name_or_path,
            revision=settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError, StrictDataclassError, SafetensorError) as error:
        reason = first_line(error)
        if (Path(settings.model_name_or_path or "") / "adapter_config.json").is_file():
            raise UserError(
                f"model_name_or_path: {settings.model_name_or_path} holds an adapter and no model; name the base model"
                f" here and the adapter's run with --run, or merge them with scripts/merge.py"
            ) from error
        raise UserError(
            f"model_name_or_path: {settings.model_name_or_path} cannot be loaded: {reason.rstrip('.')}."
            " Check the name, the revision and the network, or give a local folder. An adapter on the Hub is named in"
            " init_adapter."
        ) from error
