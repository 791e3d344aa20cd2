"""Describe the private methods of the Trainer that `training/` overrides: why, and what they must take."""

from __future__ import annotations

from qwen_vl_sft.compat.registry import Patch

_TRAINER = "transformers.trainer.Trainer"


def _override(method: str, without: str, *parameters: str, reads: tuple[str, ...] = (), link: str = "") -> Patch:
    path = f"{_TRAINER}.{method}"
    return Patch(
        name=method,
        package="transformers",
        broken="",
        kind="override",
        without=without,
        applied_by="training.trainer.VisionSFTTrainer",
        links=(link,) if link else (),
        relies_on={path: parameters},
        reads={path: reads} if reads else {},
    )


PATCHES = (
    _override(
        "_prepare_inputs",
        "The grids of images go to the GPU and are read back; DeepSpeed rounds the weights of positions.",
        "inputs",
        reads=("self._prepare_input(inputs)",),
    ),
    _override("_prepare_input", "Copying a batch from pinned memory waits for the GPU.", "data", reads=("data.to(",)),
    _override("_get_train_sampler", "The Trainer draws its own order of rows.", "train_dataset"),
    _override(
        "_get_num_items_in_batch",
        "A process that waits here for the others is not named by the watchdog.",
        "batch_samples",
        "device",
    ),
    _override("_get_grad_norm", "A gradient that is not finite changes the weights.", "model", "grad_norm"),
    _override("_save", "An adapter that DeepSpeed trains is saved rounded to bfloat16.", "output_dir", "state_dict"),
    _override(
        "_save_checkpoint",
        "A checkpoint cut off by a crash looks whole.",
        "model",
        "trial",
        reads=("self.save_model(",),
    ),
    _override(
        "_determine_best_metric",
        "The best model between two checkpoints is lost, and an older one is loaded at the end.",
        "metrics",
        "trial",
    ),
    _override(
        "_evaluate",
        "A run that was asked to stop ends only after its evaluation.",
        "trial",
        "ignore_keys_for_eval",
        "skip_scheduler",
    ),
    _override("_inner_training_loop", "The seconds of a run count from its start, not from its training."),
    _override("_run_epoch", "A run resumed from its last step's checkpoint trains one more step."),
    _override(
        "_load_optimizer_and_scheduler",
        "A resume continues with the learning rate of the checkpoint, even if the recipe has changed it.",
        "checkpoint",
    ),
    _override(
        "_load_rng_state",
        "A resume skips the evaluation that the stopped run was in.",
        "checkpoint",
    ),
    _override(
        "_finalize_training",
        "After a resume from the last step, does the same; metrics leave out the part of the run before the resume.",
    ),
    _override(
        "_load_from_checkpoint",
        "See load full weights.",
        "resume_from_checkpoint",
        "model",
        link="https://github.com/huggingface/transformers/issues/43701",
    ),
    _override(
        "_load_best_model",
        "The same, for the best checkpoint at the end.",
        link="https://github.com/huggingface/transformers/issues/43701",
    ),
)
