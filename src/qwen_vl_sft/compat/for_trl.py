"""Changes to TRL's fused output head."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from trl.trainer import utils as trl_utils


def score_places_as_they_come(model: Any) -> None:
    """Have TRL's output head score all places that a packed batch names; they are learned, all but that of a filler.

    On a GPU it would look for the learned ones by a mask, and wait for it three times in every micro-batch; on other
    devices it scores all places. Call it on a base model that has this head.
    """
    forward = model.forward

    @functools.wraps(forward)
    def without_mask(*args: Any, **kwargs: Any) -> Any:
        if "learned_places" not in kwargs:
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
