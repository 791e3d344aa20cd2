"""Changes to transformers outside of its models and its Trainer."""

from __future__ import annotations

from typing import Any


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
