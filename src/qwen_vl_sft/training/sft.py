"""Train a run, and write what is known of it into the run folder: before, at the end, and in between by callbacks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.checkpointing import run_folder
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.resume_check import checkpoint_to_resume
from qwen_vl_sft.checkpointing.save_errors import explained_save
from qwen_vl_sft.compat.for_python import settle_before_forks
from qwen_vl_sft.compat.for_transformers import prepare_final_save
from qwen_vl_sft.distributed import launch, shared_folder
from qwen_vl_sft.distributed.folder_claim import FolderClaim, claim_for_all
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.evaluation.metrics import ALL_METRICS
from qwen_vl_sft.modeling.base_identity import digest_of_weights, identity_of_base, weights_of_base
from qwen_vl_sft.modeling.base_model import count_parameters
from qwen_vl_sft.modeling.routing import spread
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.resilience.step_log import skipped_steps
from qwen_vl_sft.resilience.stopping import remove_leftovers_of_stopped_run
from qwen_vl_sft.training import plan, precompute_features
from qwen_vl_sft.training.memory import found_fit
from qwen_vl_sft.training.plots import plot_expert_load, plot_loss
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run
from qwen_vl_sft.training.rules import EVALUATION_METRICS
from qwen_vl_sft.training.trainer import SKIPPED_ROWS, VisionSFTTrainer


def claim_output_dir(run: Run, watcher: SignalWatcher) -> FolderClaim:
    """Claim the run folder until the end of the run. Raises `UserError` if it is another run's, or was used meanwhile.

    All processes must call at once.
    """
    recipe = run.recipe

    def check() -> None:
        resume = recipe.get("resume_from_checkpoint")
        raise_all([*run_folder.problems_of_output_dir(run.output_dir, recipe.run.overwrite_output_dir, resume)])

    launch.join(run.context, recipe.get("ddp_backend"))
    claim = claim_for_all(run.output_dir, "output_dir", run.context, check)
    watcher.release_when_stopped(claim.release)
    return claim


def find_resume(run: Run, signature: dict[str, Any]) -> Checkpoint | None:
    """Return the checkpoint that a run resumes from, None for a new run. All processes must call at once.

    Raises `UserError` for a checkpoint that does not fit the run, and where processes do not see each other's files.
    """
    shared_folder.check_shared(run.output_dir, run.context)
    found = checkpoint_to_resume(run.recipe, run.context, signature)
    if found and run.context.rank == 0:
        print(f"resumes     {found.path.name}, after step {found.step}", flush=True)
    return found


def train(
    run: Run, data: PreparedData, trainer: VisionSFTTrainer, resume: Checkpoint | None, watcher: SignalWatcher
) -> None:
    """Train, and write the run folder. All processes must call at once."""
    if data.features:
        precompute_features.fill(trainer, data.features, run.recipe.data.bad_rows == "skip")
    first = run.context.rank == 0
    if first:
        begin_run_folder(run, data)
        remove_leftovers_of_stopped_run(run.output_dir, resume.step if resume else 0)
    trainer.accelerator.wait_for_everyone()
    watcher.keep_workers()
    if run.context.processes > 1:
        settle_before_forks()
    with watcher.while_training():
        metrics = train_and_save(run, data, trainer, resume)
        if first:
            finish_run_folder(trainer, run.output_dir, metrics)
            print(plan.outcome(metrics, run.output_dir), flush=True)
    trainer.accelerator.end_training()


def train_and_save(
    run: Run, data: PreparedData, trainer: VisionSFTTrainer, resume: Checkpoint | None = None
) -> dict[str, Any]:
    """Train, save the final model, and return the metrics of the run."""
    assert isinstance(trainer.model, nn.Module)
    parameters = count_parameters(trainer.model)
    trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
    trainer.end_workers()
    throughput = trainer.throughput
    throughput.measure(trainer.accelerator)
    finished = trainer.finished
    fit = found_fit(trainer)
    metrics = {
        # Of the whole run, also of what was trained before it was resumed, if that is known.
        "train_loss": trainer.mean_loss(),
        "train_runtime": finished["seconds"],
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        **_evaluation_of_saved_model(trainer),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "step_of_weights": trainer.state.best_global_step if _loads_best(trainer) else trainer.state.global_step,
        # The commit of a base model from the Hub, None for a folder.
        "base_commit": getattr(trainer.model.config, "_commit_hash", None),
        **throughput.summary(run.context.processes),
        **({"memory": asdict(fit)} if fit else {}),
        "work": throughput.total.stored(),
        **({"experts": spread(trainer.routing.total)} if trainer.routing else {}),
        "skipped_while_training": throughput.total.skipped,
        "skipped_while_evaluating": _skipped_while_evaluating(trainer),
        "skipped_steps": skipped_steps(run.output_dir),
        "failed_loggers": trainer.failed_loggers,
        "data": data.summary(),
        "parameters": {part: asdict(count) for part, count in parameters.items()},
    }
    prepare_final_save(trainer.accelerator)
    if not run.recipe.model.use_peft and not trainer.is_deepspeed_enabled:
        # DeepSpeed saves the copy that it computes with.
        trainer.model.to(getattr(torch, run.recipe.model.dtype))
    trainer.save_final_model(run.output_dir)
    return metrics


def begin_run_folder(run: Run, data: PreparedData) -> None:
    """Write what is known before training; call it on one process only."""
    recipe, context = run.recipe, run.context
    devices = [] if context.on_cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = run_folder.environment(asdict(context), data.summary(), devices)
    # What "auto" came to here; the recipe says only that it was asked.
    environment["chosen"] = asdict(run.chosen)
    # An adapter of the run answers on this base alone.
    environment[run_folder.BASE] = identity_of_base(recipe.model)
    if weights := weights_of_base(recipe.model):
        environment[run_folder.BASE_WEIGHTS] = digest_of_weights(weights)
    message = data.encoder.system_message
    run_folder.begin(run.output_dir, recipe.run.overwrite_output_dir, recipe.to_yaml(), message, environment)


def finish_run_folder(trainer: VisionSFTTrainer, folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics, log and plot; call it on one process only. Raises `UserError` when they cannot be written."""
    history = trainer.state.log_history
    with explained_save("the metrics of the finished model", folder, trainer.writer.newest(), remove=False):
        run_folder.finish(folder, metrics, history)
        plot_loss(history, folder / run_folder.LOSS_PLOT)
        if trainer.routing is not None:
            plot_expert_load(trainer.routing.total, history, folder / run_folder.EXPERT_LOAD_PLOT)


def _evaluation_of_saved_model(trainer: VisionSFTTrainer) -> dict[str, float]:
    """Return the evaluation of the model that is saved: the best when that is loaded at the end, else the last."""
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if _loads_best(trainer):
        entries = [entry for entry in entries if entry["step"] == trainer.state.best_global_step] or entries
    names = [f"eval_{name}" for name in (*EVALUATION_METRICS, *ALL_METRICS, SKIPPED_ROWS)]
    return {name: entries[-1][name] for name in names if name in entries[-1]} if entries else {}


def _loads_best(trainer: VisionSFTTrainer) -> bool:
    """Return whether the model that is saved at the end is that of the best evaluation."""
    return bool(trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint)


def _skipped_while_evaluating(trainer: VisionSFTTrainer) -> int:
    """Count rows that evaluations could not read, each as often as one met it; also of evaluations before a resume."""
    return sum(int(entry.get(f"eval_{SKIPPED_ROWS}", 0)) for entry in trainer.state.log_history)
