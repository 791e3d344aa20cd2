"""Check that a run may resume from a checkpoint: same rows in the same order, same weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from qwen_vl_sft.checkpointing import checkpoints, manifest
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.pickles import problem_of_pickles
from qwen_vl_sft.checkpointing.run_folder import BASE, BASE_WEIGHTS, ENVIRONMENT, read_facts
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import current_metric
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, first_line, raise_all

# Strategies whose checkpoints hold whole weights and a whole optimizer.
_WHOLE = ("single", "ddp")
# These hold from the checkpoint on, but for schedules that follow the evaluations: with what they have seen they take
# their own settings from it, and no other schedule could read that.
SCHEDULE_KEYS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
# What a manifest leaves out where it is not set; those of earlier versions also the first.
_UNSET = {
    "cache_image_features": None,
    "enable_thinking": False,
    "train_router": False,
    "router_aux_loss_coef": 0.0,
    "load_in_fp8": False,
    "fp8_gradients": False,
}


def checkpoint_to_resume(recipe: Recipe, context: DistributedContext, signature: dict[str, Any]) -> Checkpoint | None:
    """Return the checkpoint that this run resumes from, the same on every process. Raises `UserError` if it may not.

    Call it on all processes after `distributed.launch.join`: the first one reads the folder and sends the result to the
    others. `signature` is the signature of this run (`training.run_signature`).
    """
    resume = recipe.get("resume_from_checkpoint")
    if not resume:
        return None
    found: Checkpoint | None = None
    if context.rank == 0:
        checkpoint = checkpoints.find(recipe.output_dir, resume, _tell)
        if checkpoint is None:
            _tell(f"{recipe.output_dir} holds no checkpoint to resume from; the run starts from the beginning")
        else:
            for note in check(checkpoint, signature, recipe.model.lora_dropout if recipe.model.use_peft else 0.0):
                _tell(note)
            alike = _same_metric_and_eval_rows(checkpoint, signature)
            best = _best(checkpoint) if alike and recipe.get("load_best_model_at_end") else None
            for folder in [checkpoint.path, *([best] if best else [])] if recipe.model.use_safetensors else []:
                _check_pickles(folder)
            found = replace(checkpoint, best=best, same_metric_and_eval_rows=alike)
            if not alike and (recipe.get("load_best_model_at_end") or recipe.get("save_strategy") == "best"):
                _tell("the best model so far was chosen on other rows or by another metric; earlier scores are ignored")
            if not checkpoint.totals:
                _tell(
                    f"{checkpoint.path} does not record losses and times; metrics.json will cover only the steps from here on"
                )
    resumed: Checkpoint | None = launch.from_first(context, found)
    return resumed


def _best(checkpoint: Checkpoint) -> Path | None:
    """Return the best checkpoint so far. The state file names its old path, so it is looked up in this run folder."""
    try:
        state = json.loads((checkpoint.path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        name = Path(state.get("best_model_checkpoint") or "").name
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = f"resume_from_checkpoint: {checkpoint.path / TRAINER_STATE_NAME}"
        raise UserError(f"{where} cannot be read: {first_line(error)}; name another checkpoint") from None
    if not checkpoints.is_checkpoint_name(name):
        return None
    best = checkpoint.path.parent / name
    problem = manifest.problem_of(best)
    if problem:
        _tell(f"skipped {best}, the best so far: {problem}; the best one from here on will be loaded at the end")
    return None if problem else best


def _check_pickles(folder: Path) -> None:
    problem = problem_of_pickles(folder)
    if problem:
        raise UserError(
            f"resume_from_checkpoint: {folder}: {problem}. A checkpoint of this package holds tensors and plain data, and"
            f" anything else could run code here; if you trust whoever wrote it, set use_safetensors: false"
        )


def check(checkpoint: Checkpoint, signature: dict[str, Any], dropout: float) -> list[str]:
    """Return notes on a resume that is allowed. Raises `UserError` with every reason against it."""
    if not checkpoint.manifest:
        return []
    was, now = _settings(checkpoint.manifest), _settings(signature)
    changed = [name for name in sorted(was.keys() & now.keys()) if was[name] != now[name]]
    same_weights = BASE in changed and _has_same_weights(checkpoint, signature)
    if same_weights:
        changed.remove(BASE)
    follows = {was.get("lr_scheduler_type"), now.get("lr_scheduler_type")} & set(_FOLLOW_EVALUATIONS)
    held = [] if follows else [name for name in changed if name in SCHEDULE_KEYS]
    problems = [_differs(checkpoint, name, was[name], now[name]) for name in changed if name not in held]
    if follows and not _same_metric_and_eval_rows(checkpoint, signature):
        problems.append(
            f"resume_from_checkpoint: {checkpoint.path} was evaluated on other rows or by another metric, which"
            f" lr_scheduler_type {now['lr_scheduler_type']} follows; set them back, or start a new run in another output_dir"
        )
    world_problem = _other_world(checkpoint, signature["world"])
    raise_all(problems + ([world_problem] if world_problem else []))
    notes = [f"{checkpoint.path} had {name} {was[name]}; the run continues with {now[name]}" for name in held]
    if same_weights:
        notes.append(
            f"{checkpoint.path} had the base {was[BASE]}; {now[BASE]} holds the same weights, compared in bfloat16, in other"
            f" files"
        )
    unknown = sorted(now.keys() - was.keys()) + ([] if "judge" in checkpoint.manifest else list(signature["judge"]))
    if unknown:
        notes.append(f"{checkpoint.path} does not record its {', '.join(unknown)}: check that they are unchanged")
    if checkpoint.manifest["world"] != signature["world"]:
        exact = "dropout draws other random numbers" if dropout else "losses agree up to rounding"
        notes.append(
            f"{checkpoint.path} was written by {_words(checkpoint.manifest['world'])} and continues with"
            f" {_words(signature['world'])}: the same rows in the same steps, {exact}"
        )
    versions = signature["versions"]
    others = [
        f"{name} {old}, now {versions[name]}"
        for name, old in checkpoint.manifest["versions"].items()
        if versions[name] != old
    ]
    if others:
        notes.append(f"{checkpoint.path} was written with {'; '.join(others)}: losses may differ in the last digits")
    return notes


def _settings(signature: dict[str, Any]) -> dict[str, Any]:
    """Return the compared values by key. Manifests of earlier versions lack some, or have `learning_rate` at the top."""
    rate = {"learning_rate": signature["learning_rate"]} if "learning_rate" in signature else {}
    return {**_UNSET, **signature["same"], **rate, **signature.get("schedule", {})}


def _has_same_weights(checkpoint: Checkpoint, signature: dict[str, Any]) -> bool:
    """Return whether the base of the checkpoint has the tensors of this run's, in whatever files."""
    recorded = checkpoint.manifest.get(BASE_WEIGHTS)
    if recorded is None:  # of an earlier version
        environment = read_facts(checkpoint.path.parent / ENVIRONMENT)
        if environment.get(BASE) == checkpoint.manifest["same"][BASE]:
            recorded = environment.get(BASE_WEIGHTS)
    return recorded is not None and recorded == signature.get(BASE_WEIGHTS)


def _same_metric_and_eval_rows(checkpoint: Checkpoint, signature: dict[str, Any]) -> bool:
    """Return whether earlier scores can be compared with later ones, as far as the manifest says."""
    judge = dict(checkpoint.manifest.get("judge", signature["judge"]))
    if isinstance(metric := judge.get("metric_for_best_model"), str):
        judge["metric_for_best_model"] = current_metric(metric)
    return bool(judge == signature["judge"])


def _differs(checkpoint: Checkpoint, name: str, was: Any, now: Any) -> str:
    where = f"resume_from_checkpoint: {checkpoint.path}"
    if name in ("rows", "data"):
        what = f"{was} rows, now {now}" if name == "rows" else "other rows, or rows in another encoding"
        return f"{where} was trained on {what}; restore the data and its keys, or start a new run in another output_dir"
    return f"{where} has {name} {was}, this run {now}; set it back, or start a new run in another output_dir"


def _other_world(checkpoint: Checkpoint, now: dict[str, Any]) -> str | None:
    was = checkpoint.manifest["world"]
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
