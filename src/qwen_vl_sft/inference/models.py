"""Load the processor and the model of an arm, and attach a run's adapter to its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, first_line, shortened
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.inference.source import Source, tuned_settings
from qwen_vl_sft.modeling.adapter_layout import adapter_keys, in_our_layout

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def make_encoder(source: Source, arm: str, processor: Any, system_message: str) -> Encoder:
    """Build the encoder of an arm's prompts; a row's own system message stays in every arm. Raises `UserError`."""
    from qwen_vl_sft.modeling.base_model import load_family

    settings = tuned_settings(source.recipe.model, source.tuned) if source.tuned else source.recipe.model
    message = system_message if arm != "base" and system_message else None
    return Encoder(processor, message, chat=load_family(settings).chat_with(source.recipe.data.enable_thinking))


def load_run_processor(source: Source) -> Any:
    """Load the processor of the run, else of the base model; the recipe's `min_pixels` and `max_pixels` win over its own."""
    from transformers import AutoProcessor

    from qwen_vl_sft.modeling.base_model import check_chat_template, load_processor, set_pixel_limits

    limits = source.recipe.data.min_pixels, source.recipe.data.max_pixels
    if source.tuned is None:
        return load_processor(source.recipe.model, *limits)
    folder = source.tuned.folder
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        folder = source.tuned.home  # a checkpoint may hold weights alone
    if source.tuned.recipe_file is None and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return load_processor(source.recipe.model, *limits)  # other trainers save the adapter alone
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {folder} holds no usable processor: {first_line(error)}") from None
    check_chat_template(processor, f"--run: {folder}")
    set_pixel_limits(processor, *limits)
    return processor


def load_arm(source: Source, arm: str, model: Any, context: DistributedContext) -> Any:
    """Load the model of an arm. `model` is the previous arm's or None: base and prompted share it, tuned builds on it."""
    from qwen_vl_sft.modeling.base_model import load_model
    from qwen_vl_sft.modeling.kernels import use_fused_kernels

    def load(settings: ModelSettings) -> Any:
        loaded = load_model(settings, context.on_cpu, context.local_rank)
        use_fused_kernels(loaded, answering_kernels(settings, context.on_cpu))
        return loaded

    if arm != "tuned":
        return model if model is not None else load(source.recipe.model)
    assert source.tuned is not None
    if not source.tuned.is_adapter:
        return load(tuned_settings(source.recipe.model, source.tuned))
    tuned = attach_adapter(model if model is not None else load(source.recipe.model), source.tuned.folder)
    answer_with_adapters(tuned, source.recipe.model)
    return tuned


def answer_with_adapters(model: Any, settings: ModelSettings) -> None:
    """Have the adapters of a model on a GPU compute in its half precision, as they do in training under autocast."""
    import torch

    from qwen_vl_sft.modeling.kernels import LORA, chosen_kernels, compute_adapters_in

    named = settings.fused_kernels
    halved = settings.dtype != "float32" and not settings.load_in_fp8
    if model.device.type == "cuda" and halved and (named is None or LORA in chosen_kernels(named, on_cpu=False)):
        compute_adapters_in(model, getattr(torch, settings.dtype))


def answering_kernels(settings: ModelSettings, on_cpu: bool) -> list[str]:
    """Return the fused kernels that a base answers with: on a GPU those of its recipe, or all that run if it names none."""
    from qwen_vl_sft.modeling.kernels import LORA, chosen_kernels

    if on_cpu:
        return []
    named = settings.fused_kernels
    return [name for name in chosen_kernels("auto" if named is None else named, on_cpu) if name != LORA]


def attach_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Attach a run's adapter to the base model under a name, and check that every weight was loaded.

    PEFT loads an adapter of another model without an error and without effect. Raises `UserError`.
    """
    with in_our_layout(folder, model) as placed:
        return _attach(model, placed, name, folder)


def _attach(model: Any, placed: Path, name: str, folder: Path) -> Any:
    """Attach the adapter in `placed`, which messages call by the `folder` that it is from."""
    from peft import PeftModel, get_peft_model_state_dict

    from qwen_vl_sft.modeling.experts import use_grouped_lora

    saved = set(adapter_keys(placed))
    try:
        # Without a device PEFT would load every process's adapter onto the first GPU.
        device = str(model.device)
        if isinstance(model, PeftModel):
            tuned = model
            tuned.load_adapter(str(placed), adapter_name=name, torch_device=device)
        else:
            tuned = PeftModel.from_pretrained(model, str(placed), adapter_name=name, torch_device=device)
    except (ValueError, RuntimeError) as error:
        why = shortened(" ".join(str(error).split()))
        raise UserError(
            f"--run: the adapter in {folder} does not fit its base model: {why}; give the base model it was trained on with"
            f" --model_name_or_path"
        ) from None
    # Embeddings may be saved in full with their adapter; looking for them here could contact the Hub.
    expected = set(get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False))
    unplaced = sorted((expected - saved) | {name for name in saved - expected if ".lora_" in name})
    if unplaced:
        raise UserError(
            f"--run: {len(unplaced)} weights of the adapter in {folder} and of the base model have no counterpart, the"
            f" first of them {unplaced[0]}; give the base model it was trained on with --model_name_or_path"
        )
    use_grouped_lora(tuned)
    return tuned


def changes_tower(model: Any) -> bool:
    """Return whether a model's adapter reaches its vision tower or what merges its patches."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(model, PeftModel):
        return False
    family = family_of(model.get_base_model().config)
    return any(
        family.part_of(name) != "language"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
