"""Merges where the base of training, or the one that is merged into, is a checkpoint of FP8 weights."""

from __future__ import annotations

from dataclasses import replace

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.trained_base import base_of_run
from qwen_vl_sft.merging.plan import MergePlan
from qwen_vl_sft.modeling.base_identity import identity_of_base
from qwen_vl_sft.modeling.base_model import load_config, without_quantization
from qwen_vl_sft.modeling.fp8.computation import EMULATION


def check_fp8_base(plan: MergePlan, in_fp8: bool) -> None:
    """Raise `UserError` where the base's weights cannot be what the merge is asked for.

    Args:
        plan: the merge.
        in_fp8: the base's files hold FP8 weights.
    """
    name = plan.base.model_name_or_path
    if in_fp8 and not plan.options.fp8_aware:
        keep = "; add --fp8_aware to merge into these, dequantized" if plan.trained.load_in_fp8 else ""
        raise UserError(
            f"base model {name} holds FP8 weights, not the 16-bit ones they were made from{keep}; or name the 16-bit model"
            f" with --base"
        )
    if not plan.options.fp8_aware or _is_base_of_training(plan):
        return
    if in_fp8:
        raise UserError(
            f"--fp8_aware: the run in {plan.tuned.home} does not tell that it was trained on the FP8 weights of {name}, so"
            f" the sum may not be what was trained; leave --base out, or name the base of training"
        )
    if trained_on_fp8_checkpoint(plan):
        raise UserError(
            f"--fp8_aware: the run in {plan.tuned.home} was trained on the FP8 weights of"
            f" {plan.recipe.model.model_name_or_path}, which cannot be made from those of {name}; leave --base out, or leave"
            f" --fp8_aware out to merge into {name} as it is"
        )


def of_training(plan: MergePlan, trained: ModelSettings, in_fp8: bool) -> ModelSettings:
    """Return how training loaded its base, with `trained` in the folder of the base that is merged into.

    Weights of an FP8 checkpoint are not those that its 16-bit model has in FP8; and CPUs emulate FP8 products.
    """
    if trained.load_in_fp8 and not in_fp8 and trained_on_fp8_checkpoint(plan):
        trained = plan.recipe.model
    return replace(trained, load_in_fp8=EMULATION) if trained.load_in_fp8 and plan.on_cpu else trained


def trained_on_fp8_checkpoint(plan: MergePlan) -> bool:
    """Return whether the base of the run's recipe is a checkpoint of FP8 weights, as far as it can be read here."""
    try:
        return without_quantization(load_config(plan.recipe.model))[1] is not None
    except UserError:
        return False


def _is_base_of_training(plan: MergePlan) -> bool:
    named = plan.recipe.model.model_name_or_path
    if plan.base.model_name_or_path == named:
        return True
    return base_of_run(plan.tuned.home, named) == identity_of_base(plan.base)
