"""The arms of an evaluation: which message and which weights each is asked with, and in which precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.evaluation.options import ADAPTER_FILE, ARMS, Plan, Source, TunedModel, tuned_settings

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def choose_arms(plan: Plan, system_message: str) -> tuple[str, ...]:
    """The arms asked for, or all that can be told apart, in the order in which one model serves them all."""
    if plan.options.arms is not None:
        if "prompted" in plan.options.arms and not system_message:
            raise UserError(
                "--arms: prompted is the base model with a system message, and there is none, so it would repeat base;"
                " leave it out, or give --system_message"
            )
        return tuple(arm for arm in ARMS if arm in plan.options.arms)
    return ("base", *(["prompted"] if system_message else []), *(["tuned"] if plan.tuned else []))


def make_encoder(arm: str, processor: Any, system_message: str) -> Encoder:
    """How prompts of an arm are made; a row's own system message stays in every arm."""
    return Encoder(processor, system_message=system_message if arm != "base" and system_message else None)


def load_run_processor(plan: Source) -> Any:
    """The run's processor with its pixel limits, or the model's without a run; `min_pixels`, `max_pixels` win over both."""
    from transformers import AutoProcessor

    from qwen_vl_sft.modeling.base_model import load_processor, set_pixel_limits

    limits = plan.recipe.data.min_pixels, plan.recipe.data.max_pixels
    if plan.tuned is None:
        return load_processor(plan.recipe.model, *limits)
    folder = plan.tuned.folder
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        folder = plan.tuned.home  # a checkpoint may hold weights alone
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {folder} holds no usable processor: {first_line(error)}") from None
    set_pixel_limits(processor, *limits)
    return processor


def load_arm(plan: Source, arm: str, model: Any, context: DistributedContext) -> Any:
    """The model of an arm. `model` is that of the arm before, or None: base and prompted share one, tuned builds on it."""
    from qwen_vl_sft.modeling.base_model import load_model

    def load(settings: ModelSettings) -> Any:
        return load_model(settings, context.on_cpu, context.local_rank)

    if arm != "tuned":
        return model if model is not None else load(plan.recipe.model)
    assert plan.tuned is not None
    if not plan.tuned.is_adapter:
        return load(tuned_settings(plan.recipe.model, plan.tuned))
    return attach_adapter(model if model is not None else load(plan.recipe.model), plan.tuned.folder)


def attach_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """Put a run's adapter on the base model, under a name beside others, and prove that each weight found a place.

    PEFT loads an adapter of another model without an error, and then it does nothing. Raises `UserError`.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            saved = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--run: {folder / ADAPTER_FILE} cannot be read: {first_line(error)}; copy it again, or name another checkpoint"
        ) from None
    try:
        # Without a device PEFT puts the adapter of every process on the first GPU.
        device = str(model.device)
        if isinstance(model, PeftModel):
            tuned = model
            tuned.load_adapter(str(folder), adapter_name=name, torch_device=device)
        else:
            tuned = PeftModel.from_pretrained(model, str(folder), adapter_name=name, torch_device=device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--run: the adapter in {folder} does not fit its base model: {error}") from None
    # Whole embeddings may be saved beside an adapter of theirs; asking for them here could ask the Hub.
    expected = set(get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False))
    unplaced = sorted((expected - saved) | {name for name in saved - expected if ".lora_" in name})
    if unplaced:
        raise UserError(
            f"--run: {len(unplaced)} weights of the adapter in {folder} and of the base model have no counterpart, the"
            f" first of them {unplaced[0]}; give the base model it was trained on with --model_name_or_path"
        )
    return tuned


def check_one_base(sources: Sequence[Source]) -> None:
    """Raise `UserError` unless all runs build on the same base model in the same precision; full models stand alone."""
    first = sources[0]
    problems = []
    for source in sources[1:]:
        ours, theirs = _base_of(first.recipe.model), _base_of(source.recipe.model)
        different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if different:
            assert source.tuned
            problems.append(
                f"--run: {source.tuned.folder} has {' and '.join(different)}, but one base model serves all runs; leave it"
                f" out, or give the same to all on the command line (--model_name_or_path, --dtype, --load_in_4bit)"
            )
    if problems:
        raise UserError(*problems)


def _base_of(settings: ModelSettings) -> dict[str, Any]:
    return {
        "model_name_or_path": settings.model_name_or_path,
        "model_revision": settings.model_revision,
        "precision": settings.precision,
    }


def precision_summary(plan: Source) -> dict[str, Any]:
    """In which precision the arms were scored and the run was trained."""
    scored = plan.recipe.model.precision
    trained = plan.trained.precision if plan.trained else None
    return {"scored": scored, "trained": trained, "scored_as_trained": trained is None or scored == trained}


def identify(tuned: TunedModel | None) -> list[list[Any]]:
    """The weights of a run, by name, size and time: a resumed evaluation must meet the same."""
    files = sorted(tuned.folder.glob("*.safetensors")) if tuned else []
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files]


def model_identity(plan: Plan, arms: Sequence[str]) -> dict[str, Any]:
    """Everything about the models that the answers depend on, as plain values. Raises `UserError`."""
    settings = dataclasses.asdict(plan.recipe.model)
    lora = [name for name in settings if name.startswith(("lora", "use_peft", "use_rslora", "use_dora", "freeze"))]
    weights = {
        "base_weights": _base_weights(plan, arms),
        "run": str(plan.tuned.folder) if plan.tuned else None,
        "run_weights": identify(plan.tuned),
    }
    return {name: value for name, value in settings.items() if name not in lora} | weights


def _base_weights(plan: Plan, arms: Sequence[str]) -> str | None:
    """Which base model it is, by its commit or files. None where it is gone and no arm needs it. Raises `UserError`."""
    from qwen_vl_sft.modeling.base_identity import identity_of_base

    # Also where no arm needs it: one that does may be added later.
    try:
        return identity_of_base(plan.recipe.model)
    except (UserError, OSError) as error:
        if plan.tuned and not plan.tuned.is_adapter and set(arms) == {"tuned"}:
            return None
        if isinstance(error, UserError):
            raise
        name = plan.recipe.model.model_name_or_path
        raise UserError(
            f"model_name_or_path: {name} cannot be read: {error.strerror}: {error.filename}; name a whole model"
        ) from None
