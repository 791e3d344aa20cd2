"""Changes to the forward of a loaded model that training needs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


def run_frozen_vision_without_gradients(model: nn.Module) -> None:
    """Build no graph over a vision tower in which nothing trains.

    The graph would be kept, and run backwards, because checkpointing makes its input require gradients.
    """
    visual = next(module for name, module in model.named_modules() if name.endswith("visual"))
    forward = visual.forward

    @functools.wraps(forward)
    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    visual.forward = without_gradients


def has_tied_embeddings(model: Any) -> bool:
    """Whether the output head is the input embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def call_tied_head_after_backbone(model: Any) -> None:
    """Under FSDP2, call the output head on nothing whenever the backbone has run.

    accelerate puts tied embeddings and the head into one FSDP group, which gathers its weights when its first layer
    runs and is ready to do so again only when all of them have run. TRL's fused head reads the head's weight and never
    calls it, so the second forward would meet weights that are split. May go when TRL's `add_fused_lm_head` runs the
    head's hooks.
    """

    def call_head(backbone: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if keywords.get("use_cache"):
            return  # while generating, the model's own forward calls the head
        with torch.no_grad():
            model.get_output_embeddings()(output.last_hidden_state[:, :0])

    model.model.register_forward_hook(call_head, with_kwargs=True)
