"""Changes to TRL's fused output head."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from trl.trainer import utils as trl_utils

from qwen_vl_sft.compat.registry import Patch, source_of


def score_places_as_they_come(model: Any) -> None:
    """Skip TRL's label mask: the positions that a packed batch lists are already the targets.

    On a GPU it would look for the learned ones by a mask, and wait for it three times in every micro-batch; on other
    devices it scores all places. Call it on a base model that has this head.
    """
    forward = model.forward

    @functools.wraps(forward)
    def without_mask(*args: Any, **kwargs: Any) -> Any:
        if "logit_positions" not in kwargs:
            return forward(*args, **kwargs)
        compacts, trl_utils._use_triton = trl_utils._use_triton, lambda device: False
        try:
            return forward(*args, **kwargs)
        finally:
            trl_utils._use_triton = compacts

    model.forward = without_mask


def call_head_after_backbone(model: Any) -> None:
    """Under FSDP2, call the output head on nothing whenever the backbone has run.

    accelerate puts the last norm, the head, and embeddings that are tied to it into one FSDP group, which gathers its
    weights when its first layer runs and is ready to do so again only when all of them have run. TRL's fused head reads
    the head's weight and never calls it. From the second forward on it would meet a weight that is split: a tied one
    fails, and of one that is not tied each process would take its own gradient for that of all, without a word.
    """

    def call_head(backbone: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if keywords.get("use_cache"):
            return  # while generating, the model's own forward calls the head
        with torch.no_grad():
            model.get_output_embeddings()(output.last_hidden_state[:, :0])

    model.model.register_forward_hook(call_head, with_kwargs=True)


def _head_is_not_called() -> bool:
    """Return whether the fused head leaves out the hooks of the layer whose weight it reads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config = AutoConfig.for_model("llama", num_attention_heads=1, num_key_value_heads=1, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    trl_utils.add_fused_lm_head(model)
    called = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *args: called.append(True))
    ids = torch.zeros(1, 3, dtype=torch.long)
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    return not called


def _trl_leaves_normalisation_to_the_model() -> bool:
    """Return whether TRL's trainer neither says that it normalises by itself nor that its models take the count of tokens."""
    from trl import SFTTrainer

    says = "model_accepts_loss_kwargs = True" in source_of("trl.trainer.sft_trainer.SFTTrainer")
    return not says and getattr(SFTTrainer, "loss_is_scaled_for_ga", None) is None


PATCHES = (
    Patch(
        name="score_places_as_they_come",
        package="trl",
        broken="<=1.16",
        without="The output head of a packed batch waits for the GPU three times in every micro-batch.",
        applied_by="compat.for_trl.score_places_as_they_come",
        links=("https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/utils.py",),
        still_needed=lambda: "hidden_states[mask] if compact" in source_of("trl.trainer.utils.add_fused_lm_head"),
        relies_on={"trl.trainer.utils._use_triton": ("device",)},
        reads={"trl.trainer.utils.add_fused_lm_head": ("_use_triton(hidden_states.device)",)},
    ),
    Patch(
        name="call_head_after_backbone",
        package="trl",
        broken="<=1.16",
        without="Under FSDP2 the second forward meets a split head: it fails, or each process takes its own gradient.",
        applied_by="compat.for_trl.call_head_after_backbone",
        links=("https://github.com/verl-project/verl/pull/7427",),
        still_needed=_head_is_not_called,
    ),
    Patch(
        name="normalise_by_tokens_of_the_global_batch",
        package="trl",
        broken="<=1.16",
        without="Families that declare to take no loss arguments train on the mean of the means of micro-batches.",
        applied_by="training.trainer.VisionSFTTrainer",
        links=("https://github.com/huggingface/transformers/pull/40333",),
        still_needed=_trl_leaves_normalisation_to_the_model,
        reads={"transformers.trainer.Trainer": ("self.model_accepts_loss_kwargs",)},
    ),
)
