"""Return what a resume compares: number of processes, fixed settings, library versions."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np

from qwen_vl_sft.checkpointing.resume_check import SCHEDULE_KEYS
from qwen_vl_sft.checkpointing.run_folder import BASE, BASE_WEIGHTS
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.dataset import ROW_ID
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.evaluation.metrics import ALL_METRICS
from qwen_vl_sft.modeling.base_identity import digest_of_weights, identity_of_base, weights_of_base
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run

_MODEL_KEYS = (
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_scope",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
    "dtype",
    "freeze_vision_tower",
)
_ROUTER_KEYS = ("train_router", "router_aux_loss_coef")
_FP8_KEYS = ("load_in_fp8", "fp8_modules", "fp8_forward", "fp8_backward")
# The optimizer takes these from a checkpoint, whatever the recipe says.
_TRAINING_KEYS = (
    "seed",
    "bf16",
    "fp16",
    "loss_type",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
_PACKING_KEYS = ("tokens_per_batch", "share_prefixes")
_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


def run_signature(run: Run, data: PreparedData) -> dict[str, Any]:
    """Return what a resume compares, as plain data: number of processes, fixed settings, library versions."""
    recipe, context, global_batch = run.recipe, run.context, run.global_batch
    settings = recipe.run
    same: dict[str, Any] = {
        "global_batch_size": global_batch.rows,
        "global_batch_tokens": global_batch.tokens,
        BASE: identity_of_base(recipe.model),
        **{name: recipe.get(name) for name in _TRAINING_KEYS},
        "data_seed": recipe.data_seed,
        "packing": settings.packing,
        **({name: getattr(settings, name) for name in _PACKING_KEYS} if settings.packing else {}),
        # Stored features are rounded otherwise.
        "cache_image_features": settings.cache_image_features,
        **{name: asdict(recipe.model)[name] for name in _MODEL_KEYS if recipe.model.use_peft or "lora" not in name},
    }
    if recipe.data.enable_thinking:
        same["enable_thinking"] = True
    # Only where they are set: checkpoints of earlier versions do not tell them.
    same |= {name: value for name in _ROUTER_KEYS if (value := getattr(recipe.model, name))}
    if recipe.model.load_in_fp8:
        same |= {name: getattr(recipe.model, name) for name in _FP8_KEYS}
    if recipe.model.fp8_gradients:
        same |= {name: getattr(recipe.model, name) for name in ("fp8_gradients", "fp8_modules")}
    if isinstance(data.train, Scan):
        same |= {"rows": len(data.train.rows), "data": fingerprint(data.train)}
    weights = weights_of_base(recipe.model)
    return {
        "world": {"strategy": context.strategy, "processes": context.processes},
        "same": same,
        # The same base may lie in other files.
        BASE_WEIGHTS: digest_of_weights(weights) if weights else None,
        "schedule": {name: recipe.get(name) for name in SCHEDULE_KEYS},
        "judge": _judge(recipe, data.evaluation),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }


def _judge(recipe: Recipe, evaluation: Scan | None) -> dict[str, Any]:
    """Return the metric and the evaluation rows that choose the best model."""
    metric = (recipe.get("metric_for_best_model") or "loss").removeprefix("eval_")
    answers = ("max_predict_samples", "max_new_tokens") if metric in ALL_METRICS else ()
    return {
        "metric_for_best_model": metric,
        "evaluation": fingerprint(evaluation) if evaluation else None,
        **{name: getattr(recipe.run, name) for name in answers},
    }


def fingerprint(scan: Scan) -> str:
    """Return a digest of ids and lengths: the same on every machine for the same rows in the same encoding."""
    ids = scan.rows.dataset.with_format("numpy")[ROW_ID][:]  # type: ignore[index]
    digest = hashlib.sha256()
    lengths = scan.lengths
    for column in (ids, lengths.tokens, lengths.target_tokens, lengths.images, lengths.patches):
        digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
