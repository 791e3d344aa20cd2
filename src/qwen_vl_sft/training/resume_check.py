"""Whether a run may go on from a checkpoint: it must train on the same rows in the same order, with the same weights."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.checkpointing import checkpoints
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.pickles import problem_of_pickles
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.dataset import ROW_ID
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, first_line, raise_all
from qwen_vl_sft.evaluation.metrics import METRICS
from qwen_vl_sft.modeling.base_identity import identity_of_base
from qwen_vl_sft.training.prepared_data import PreparedData

# Strategies whose checkpoints hold whole weights and a whole optimizer.
_WHOLE = ("single", "ddp")
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
# These hold from the checkpoint on, but for schedules that follow the evaluations: with what they have seen they take
# their own settings from it, and no other schedule could read that.
_SCHEDULE_KEYS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


def run_signature(
    recipe: Recipe, context: DistributedContext, data: PreparedData, global_batch: GlobalBatch
) -> dict[str, Any]:
    """What a checkpoint says of its run: the world, what must be the same to go on, and versions."""
    run = recipe.run
    same: dict[str, Any] = {
        "global_batch_size": global_batch.rows,
        "global_batch_tokens": global_batch.tokens,
        "base": identity_of_base(recipe.model),
        **{name: recipe.get(name) for name in _TRAINING_KEYS},
        "data_seed": recipe.data_seed,
        "packing": run.packing,
        **({"tokens_per_batch": run.tokens_per_batch, "share_prefixes": run.share_prefixes} if run.packing else {}),
        # Stored features are rounded otherwise.
        "cache_image_features": run.cache_image_features,
        **{name: asdict(recipe.model)[name] for name in _MODEL_KEYS if recipe.model.use_peft or "lora" not in name},
    }
    if isinstance(data.train, Scan):
        same |= {"rows": len(data.train.rows), "data": fingerprint(data.train)}
    return {
        "world": {"strategy": context.strategy, "processes": context.processes},
        "same": same,
        "schedule": {name: recipe.get(name) for name in _SCHEDULE_KEYS},
        "judge": _judge(recipe, data),
        "versions": {name: metadata.version(name) for name in _VERSIONS},
    }


def _judge(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """By what evaluations tell which model is the best."""
    metric = (recipe.get("metric_for_best_model") or "loss").removeprefix("eval_")
    answers = ("max_predict_samples", "max_new_tokens") if metric in METRICS else ()
    return {
        "metric_for_best_model": metric,
        "evaluation": fingerprint(data.evaluation) if data.evaluation else None,
        **{name: getattr(recipe.run, name) for name in answers},
    }


def fingerprint(scan: Scan) -> str:
    """The same for the same rows, encoded alike: of their ids and lengths, so that it does not change with the machine."""
    ids = np.asarray(scan.rows.dataset.with_format("numpy")[ROW_ID])  # type: ignore[index]
    digest = hashlib.sha256()
    for column in (ids, scan.tokens, scan.learned, scan.images, scan.patches):
        digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def checkpoint_to_resume(recipe: Recipe, context: DistributedContext, about: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that this run goes on from, the same on every process. Raises `UserError` if it may not.

    Call it on all processes, joined by now (`training.sft.sft_config`): the first one reads the folder and tells the
    others.
    """
    resume = recipe.get("resume_from_checkpoint")
    if not resume:
        return None
    found: Checkpoint | None = None
    if context.rank == 0:
        checkpoint = checkpoints.find(recipe.output_dir, resume, _tell)
        if checkpoint is None:
            _tell(f"{recipe.output_dir} holds no checkpoint to go on from; the run starts anew")
        else:
            for note in check(checkpoint, about, recipe.model.lora_dropout if recipe.model.use_peft else 0.0):
                _tell(note)
            alike = _judged_alike(checkpoint, about)
            best = _best(checkpoint) if alike and recipe.get("load_best_model_at_end") else None
            for folder in [checkpoint.path, *([best] if best else [])] if recipe.model.use_safetensors else []:
                _check_pickles(folder)
            found = replace(checkpoint, best=best, judged_alike=alike)
            if not alike and (recipe.get("load_best_model_at_end") or recipe.get("save_strategy") == "best"):
                _tell(
                    "the best model so far was found on other rows or by another metric; it does not count from here on"
                )
            if not checkpoint.so_far:
                _tell(
                    f"{checkpoint.path} does not tell its losses and times; metrics.json will be of the steps from here on"
                )
    resumed: Checkpoint | None = launch.from_first(context, found)
    return resumed


def _best(checkpoint: Checkpoint) -> Path | None:
    """The best checkpoint until then, beside this one: the path that its file names is where the run folder was then."""
    try:
        state = json.loads((checkpoint.path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        name = Path(state.get("best_model_checkpoint") or "").name
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = f"resume_from_checkpoint: {checkpoint.path / TRAINER_STATE_NAME}"
        raise UserError(f"{where} cannot be read: {first_line(error)}; name another checkpoint") from None
    if not checkpoints.is_checkpoint_name(name):
        return None
    best = checkpoint.path.parent / name
    problem = checkpoints.problem_of(best)
    if problem:
        _tell(f"{best}, the best so far, is passed over: {problem}; the best from here on will be loaded at the end")
    return None if problem else best


def _check_pickles(folder: Path) -> None:
    problem = problem_of_pickles(folder)
    if problem:
        raise UserError(
            f"resume_from_checkpoint: {folder}: {problem}. A checkpoint of this package holds tensors and plain data, and"
            f" anything else could run code here; if you trust whoever wrote it, set use_safetensors: false"
        )


def check(checkpoint: Checkpoint, about: dict[str, Any], dropout: float) -> list[str]:
    """Notes on a resume that is allowed. Raises `UserError` with everything that stands against it."""
    if not checkpoint.about:
        return []
    was, now = _settings(checkpoint.about), _settings(about)
    changed = [name for name in sorted(was.keys() & now.keys()) if was[name] != now[name]]
    follows = {was.get("lr_scheduler_type"), now.get("lr_scheduler_type")} & set(_FOLLOW_EVALUATIONS)
    held = [] if follows else [name for name in changed if name in _SCHEDULE_KEYS]
    problems = [_differs(checkpoint, name, was[name], now[name]) for name in changed if name not in held]
    if follows and not _judged_alike(checkpoint, about):
        problems.append(
            f"resume_from_checkpoint: {checkpoint.path} was evaluated on other rows or by another metric, which"
            f" lr_scheduler_type {now['lr_scheduler_type']} follows; set them back, or start a new run in another output_dir"
        )
    world_problem = _other_world(checkpoint, about["world"])
    raise_all(problems + ([world_problem] if world_problem else []))
    notes = [f"{checkpoint.path} had {name} {was[name]}; the run goes on with {now[name]}" for name in held]
    unknown = sorted(now.keys() - was.keys()) + ([] if "judge" in checkpoint.about else list(about["judge"]))
    if unknown:
        notes.append(f"{checkpoint.path} does not say its {', '.join(unknown)}: see that they are as they were")
    if checkpoint.about["world"] != about["world"]:
        exact = "the dropout draws other numbers than before" if dropout else "losses agree up to rounding"
        notes.append(
            f"{checkpoint.path} was written by {_words(checkpoint.about['world'])} and goes on with"
            f" {_words(about['world'])}: the same rows in the same steps, {exact}"
        )
    versions = about["versions"]
    others = [
        f"{name} {old}, now {versions[name]}"
        for name, old in checkpoint.about["versions"].items()
        if versions[name] != old
    ]
    if others:
        notes.append(f"{checkpoint.path} was written with {'; '.join(others)}: losses may differ in the last digits")
    return notes


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """What is compared, by key. A mark of an earlier version lacks some, or has `learning_rate` by itself."""
    rate = {"learning_rate": about["learning_rate"]} if "learning_rate" in about else {}
    # Formerly written only where it was set.
    return {"cache_image_features": None, **about["same"], **rate, **about.get("schedule", {})}


def _judged_alike(checkpoint: Checkpoint, about: dict[str, Any]) -> bool:
    """Whether evaluations until then can be compared with those from here on, as far as the mark says."""
    return bool(checkpoint.about.get("judge", about["judge"]) == about["judge"])


def _differs(checkpoint: Checkpoint, name: str, was: Any, now: Any) -> str:
    where = f"resume_from_checkpoint: {checkpoint.path}"
    if name in ("rows", "data"):
        what = f"{was} rows, now {now}" if name == "rows" else "other rows, or rows encoded otherwise"
        return f"{where} was trained on {what}; restore the data and its keys, or start a new run in another output_dir"
    return f"{where} has {name} {was}, this run {now}; set it back, or start a new run in another output_dir"


def _other_world(checkpoint: Checkpoint, now: dict[str, Any]) -> str | None:
    was = checkpoint.about["world"]
    if was == now or (was["strategy"] in _WHOLE and now["strategy"] in _WHOLE):
        return None
    if was["strategy"] == now["strategy"] == "fsdp2":
        return None
    why = "the optimizer is saved in parts, one a process" if now["strategy"] == was["strategy"] else "the files differ"
    return (
        f"resume_from_checkpoint: {checkpoint.path} was written by {_words(was)}, this run has {_words(now)}: {why}."
        f" Launch it as before, or start a new run in another output_dir"
    )


def _words(context: dict[str, Any]) -> str:
    return f"{context['processes']} process(es) ({context['strategy']})"


def _tell(message: str) -> None:
    print(f"resume: {message}", file=sys.stderr, flush=True)
