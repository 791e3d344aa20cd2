"""Changes to transformers outside of its models and its Trainer."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from qwen_vl_sft.compat.registry import Patch, embedded_model, source_of

_ZERO3 = "transformers.integrations.deepspeed._load_state_dict_into_zero3_model"
# What a `CallbackHandler` gives to each callback.
_HANDED_ON = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")


def use_one_gpu(config: Any) -> None:
    """Have a process with these `TrainingArguments` drive one GPU, however many it sees.

    The Trainer would spread the model over all of them with DataParallel.
    """
    config._n_gpu = min(config.n_gpu, 1)


def forget_unused_renamings(model: Any) -> None:
    """Have a model that ZeRO-3 loaded saved under the names of the checkpoint it came from.

    transformers keeps the renamings that a load used, to undo them when it saves. Under ZeRO-3 it keeps all that it
    knows, and the saved weights are named model.model.layers, which few other tools read.
    """
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        model._weight_conversions = [renaming for renaming in known if renaming.was_used()]


def prepare_final_save(accelerator: Any) -> None:
    """Have `trainer.save_model` write whole weights; call it on every rank after training, and save no checkpoint then.

    Under FSDP with SHARDED_STATE_DICT, `save_model` writes nothing and says nothing. Checkpoints need SHARDED_STATE_DICT
    for QLoRA to resume.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")


def compute_linear_attention_on_cpu(model: Any) -> None:
    """Have linear attention on a CPU run in PyTorch's operations where flash-linear-attention is installed.

    transformers then calls its Triton kernels in all batches that are not packed, on whatever device these are.
    """
    modeling = sys.modules[type(model).__module__]
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(modeling, name, None)
        if function is not None and not hasattr(function, "by_device"):
            setattr(modeling, name, _by_device(function))


def _by_device(function: Any) -> Any:
    plain = inspect.unwrap(function)

    @functools.wraps(function)
    def compute(query: Any, *args: Any, **kwargs: Any) -> Any:
        return (function if query.is_cuda else plain)(query, *args, **kwargs)

    compute.by_device = True  # type: ignore[attr-defined]
    return compute


def _calls_installed_functions_anywhere() -> bool:
    """Return whether transformers calls the function of an installed package, on whatever device its arguments are."""
    from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

    found = use_kernel_func_from_hub_with_fallback("dedent", "textwrap")(lambda text: "of transformers")
    return bool(found("of the package") == "of the package")


def _saves_no_split_model() -> bool:
    """Return whether `save_model` writes nothing where FSDP keeps split checkpoints."""
    from unittest.mock import MagicMock

    from transformers import Trainer

    trainer = MagicMock(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    trainer.accelerator.state.fsdp_plugin.state_dict_type = "SHARDED_STATE_DICT"
    Trainer.save_model(trainer, "anywhere", _internal_call=True)
    return not trainer._save.called


def _looks_for_a_folder_it_does_not_make() -> bool:
    """Return whether each process looks for the best checkpoint's folder separately, and none creates it first."""
    before, looks, _ = source_of("transformers.trainer.Trainer._save_checkpoint").partition("os.path.exists(best_check")
    return bool(looks) and "makedirs" not in before


def _resume_loads_by_names_in_memory() -> bool:
    """Return whether names of files and of memory differ in the embedded model, and a resume does not translate them."""
    saved = _names_in_the_file()
    loading = source_of("transformers.trainer.Trainer._load_from_checkpoint")
    return not saved <= set(embedded_model().state_dict()) and "model.load_state_dict(state_dict, False)" in loading


def _names_in_the_file() -> set[str]:
    """Return the names of the embedded model's weights in its file."""
    from safetensors import safe_open

    from qwen_vl_sft import tiny

    with safe_open(tiny.MODEL_DIR / "model.safetensors", "pt") as file:
        return set(file.keys())


def _failing_callback_ends_training() -> bool:
    """Return whether an error of a callback leaves the Trainer's loop."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler

    class Failing(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise OSError

    handler = object.__new__(CallbackHandler)
    vars(handler).update(dict.fromkeys(_HANDED_ON), callbacks=[Failing()])
    try:
        handler.call_event("on_log", None, None, None)
    except OSError:
        return True
    return False


PATCHES = (
    Patch(
        name="use_one_gpu",
        package="transformers",
        broken="<=5.23",
        without="A process that sees several GPUs spreads the model over them with DataParallel.",
        applied_by="compat.for_transformers.use_one_gpu",
        still_needed=lambda: "nn.DataParallel(" in source_of("transformers.trainer.Trainer"),
        reads={"transformers.training_args.TrainingArguments": ("self._n_gpu",)},
    ),
    Patch(
        name="forget_unused_renamings",
        package="transformers",
        broken="<=5.23",
        without="A model that ZeRO-3 loaded is saved under names (model.model.layers) that few other tools read.",
        applied_by="compat.for_transformers.forget_unused_renamings",
        links=("https://github.com/huggingface/transformers/pull/43303",),
        still_needed=lambda: "_weight_conversions = weight_mapping" in source_of(_ZERO3),
        reads={"transformers.core_model_loading": ("_weight_conversions", "def was_used")},
    ),
    Patch(
        name="prepare_final_save",
        package="transformers",
        broken="<=5.23",
        without="Under FSDP with split checkpoints the finished model is not written, without a word.",
        applied_by="compat.for_transformers.prepare_final_save",
        links=("https://github.com/huggingface/transformers/issues/30491",),
        still_needed=_saves_no_split_model,
    ),
    Patch(
        name="make_the_checkpoints_folder_first",
        package="transformers",
        broken="<=5.23",
        without="Under FSDP only some processes see the folder of the best checkpoint, and the others hang.",
        applied_by="checkpointing.writer.CheckpointWriter",
        links=("https://github.com/huggingface/accelerate/issues/3010",),
        still_needed=_looks_for_a_folder_it_does_not_make,
    ),
    Patch(
        name="compute_linear_attention_on_cpu",
        package="transformers",
        broken="<=5.23",
        without="Qwen3.5 does not run on a CPU where flash-linear-attention is installed, for merges on one say.",
        applied_by="compat.for_transformers.compute_linear_attention_on_cpu",
        still_needed=_calls_installed_functions_anywhere,
    ),
    Patch(
        name="load_full_weights",
        package="transformers",
        broken="<=5.23",
        without="A resume of full fine-tuning finds no weight by its name and continues with the base model's.",
        applied_by="modeling.loaded_weights.load_full_weights",
        links=("https://github.com/huggingface/transformers/issues/43701",),
        still_needed=_resume_loads_by_names_in_memory,
    ),
    Patch(
        name="already_training",
        package="transformers",
        broken="<=5.23",
        without="Every micro-batch of a packed step goes through thousands of modules to set them to training.",
        applied_by="compat.packed_batches.already_training",
        still_needed=lambda: "model.train()" in source_of("transformers.trainer.Trainer.training_step"),
    ),
    Patch(
        name="load_whole_models_under_an_fsdp_launch",
        package="transformers",
        broken="<=5.23",
        without="An evaluation launched with an FSDP2 file loads a model without weights on all processes but one.",
        applied_by="evaluation.evaluate.join_processes",
        still_needed=lambda: "ACCELERATE_USE_FSDP" in source_of("transformers.integrations.fsdp.is_fsdp_enabled"),
    ),
    Patch(
        name="guard_loggers",
        package="transformers",
        broken="<=5.23",
        without="A logger of `report_to` that fails, a full disk or a lost network say, ends the run.",
        applied_by="resilience.logger_guard.guard_loggers",
        still_needed=_failing_callback_ends_training,
        reads={"transformers.integrations.integration_utils": ("INTEGRATION_TO_CALLBACK = {",)},
    ),
    Patch(
        name="read_the_loss_of_the_whole_run",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="A resumed run reports the mean loss of its last part.",
        applied_by="training.trainer.VisionSFTTrainer.totals",
        reads={
            "transformers.trainer.Trainer": (
                "self._tr_loss",
                "self._total_loss_scalar",
                "self._initial_global_step",
                "self._eval_dataloaders",
            )
        },
    ),
)
